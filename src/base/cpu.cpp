// SPDX-License-Identifier: Apache-2.0
#include "base/cpu.h"

#include <cpuid.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace quern {
namespace {

struct Leaf {
  unsigned int eax = 0;
  unsigned int ebx = 0;
  unsigned int ecx = 0;
  unsigned int edx = 0;
};

Leaf cpuid(unsigned int leaf, unsigned int subleaf = 0) {
  Leaf r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) {
    return {};
  }
  return r;
}

bool bit(unsigned int word, unsigned int index) {
  return ((word >> index) & 1U) != 0;
}

// Register state that the operating system saves (XCR0); 0 without XSAVE.
std::uint64_t saved_state() {
  unsigned int low = 0;
  unsigned int high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32U) | low;
}

std::string brand() {
  std::array<char, 49> text{};
  for (unsigned int i = 0; i < 3; ++i) {
    const Leaf part = cpuid(0x80000002U + i);
    std::memcpy(text.data() + 16 * i, &part, sizeof(part));
  }
  std::string name(text.data());
  const auto first = name.find_first_not_of(' ');
  return first == std::string::npos ? std::string("unknown") : name.substr(first);
}

}  // namespace

CpuFeatures detect_cpu() {
  CpuFeatures cpu;
  cpu.name = brand();
  const Leaf vendor = cpuid(0);
  cpu.amd = vendor.ebx == signature_AMD_ebx;
  const Leaf one = cpuid(1);
  if (!bit(one.ecx, 27)) {  // OSXSAVE
    return cpu;
  }
  const std::uint64_t state = saved_state();
  const bool ymm = (state & 0x6U) == 0x6U;
  const bool zmm = (state & 0xe6U) == 0xe6U;
  const Leaf seven = cpuid(7);
  cpu.avx2 = ymm && bit(seven.ebx, 5) && bit(one.ecx, 12) && bit(one.ecx, 29);
  cpu.avx512 = zmm && cpu.avx2 && bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) &&
               bit(seven.ebx, 31);
  cpu.avx512_vnni = cpu.avx512 && bit(seven.ecx, 11);
  cpu.avx512_bf16 = cpu.avx512 && bit(cpuid(7, 1).eax, 5);
  cpu.amx_bf16 = cpu.avx512 && bit(seven.edx, 22);
  return cpu;
}

}  // namespace quern
