// SPDX-License-Identifier: Apache-2.0
// The tensors of one GPTQ module with arbitrary contents and, sometimes, wrong shapes. What can be
// read must be written to the same values, or refused.
#include "base/error.h"
#include "dealer.h"
#include "format/gptq.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  quern::fuzz::Dealer dealer({reinterpret_cast<const std::byte*>(data), size});
  quern::QuantScheme scheme;
  scheme.bits = dealer.byte() % 12;
  scheme.group_size = std::array<std::int64_t, 4>{0, 16, 32, 48}[dealer.byte() % 4U];
  const auto version = static_cast<quern::GptqVersion>(dealer.byte() % 3U);
  const std::int64_t out = dealer.byte() % 80;
  const std::int64_t in = dealer.byte() % 80;
  const std::uint8_t lie = dealer.byte();
  try {
    if (scheme.bits == 0 || in == 0) {
      return 0;  // no shape follows from these
    }
    auto declared = quern::gptq_declarations("m", scheme, out, in);
    if (lie < 4) {
      declared[lie].shape.back() += 1;
    }
    std::array<std::vector<std::byte>, 4> contents;
    std::array<quern::TensorView, 4> views;
    for (std::size_t i = declared.size(); i-- > 0;) {
      contents[i] = dealer.contents(declared[i]);
      views[i] = {declared[i].dtype, declared[i].shape, contents[i]};
    }
    const quern::PackedLinear packed = quern::unpack_gptq(
        {views[0], views[1], views[2], views[3]}, scheme, version, out, in, "input");
    const quern::GptqBytes written = quern::pack_gptq(packed, version, "input");
    const quern::GptqTensors stored{
        {declared[0].dtype, declared[0].shape, written.qweight},
        {declared[1].dtype, declared[1].shape, written.qzeros},
        {declared[2].dtype, declared[2].shape, written.scales},
        std::nullopt};
    const quern::PackedLinear again =
        quern::unpack_gptq(stored, scheme, version, out, in, "written");
    if (again.codes != packed.codes || again.zeros != packed.zeros ||
        again.scales != packed.scales) {
      std::abort();
    }
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
