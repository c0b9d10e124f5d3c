// SPDX-License-Identifier: Apache-2.0
// The tensors of one AWQ module with arbitrary contents and, sometimes, wrong shapes. What can be
// read must be written to the same bytes, or refused.
#include "base/error.h"
#include "dealer.h"
#include "format/awq.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  quern::fuzz::Dealer dealer({reinterpret_cast<const std::byte*>(data), size});
  quern::QuantScheme scheme{4, false, 0};
  scheme.group_size = std::array<std::int64_t, 4>{0, 8, 16, 20}[dealer.byte() % 4U];
  const std::int64_t out = dealer.byte() % 80;
  const std::int64_t in = dealer.byte() % 80;
  const std::uint8_t lie = dealer.byte();
  try {
    if (in == 0) {
      return 0;  // no shape follows from it
    }
    auto declared = quern::awq_declarations("m", scheme, out, in);
    if (lie < declared.size()) {
      declared[lie].shape.back() += 1;
    }
    std::array<std::vector<std::byte>, 3> contents;
    std::array<quern::TensorView, 3> views;
    for (std::size_t i = declared.size(); i-- > 0;) {
      contents[i] = dealer.contents(declared[i]);
      views[i] = {declared[i].dtype, declared[i].shape, contents[i]};
    }
    const quern::PackedLinear packed =
        quern::unpack_awq({views[0], views[1], views[2]}, scheme, out, in, "input");
    const quern::AwqBytes written = quern::pack_awq(packed, "input");
    if (written.qweight != contents[0] || written.qzeros != contents[1] ||
        written.scales != contents[2]) {
      std::abort();
    }
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
