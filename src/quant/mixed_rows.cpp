// SPDX-License-Identifier: Apache-2.0
#include "quant/mixed_rows.h"

#include "base/error.h"

#include <fmt/format.h>

#include <utility>

namespace quern {
void MixedRows::dequantize_row(
    const KernelTable& kernels,
    std::int64_t row,
    std::span<std::uint8_t> scratch,
    std::span<float> out) const {
  const std::uint32_t entry = row_map[static_cast<std::size_t>(row)];
  const PackedLinear& table = (entry & kHotBit) != 0 ? hot : cold;
  table.dequantize_row(kernels, entry & ~kHotBit, scratch, out);
}

Json MixedRows::parameters() const {
  return {{"hot_rows", hot.out_features}, {kHot, hot.parameters()}, {kCold, cold.parameters()}};
}

std::vector<MatrixPart> MixedRows::parts() const {
  std::vector<MatrixPart> all = {{"row_map", DType::kU32, {out_features}, bytes_of(row_map)}};
  for (const auto& [name, table] : {std::pair(kHot, &hot), std::pair(kCold, &cold)}) {
    for (MatrixPart& part : table->parts()) {
      part.name = fmt::format("{}.{}", name, part.name);
      all.push_back(std::move(part));
    }
  }
  return all;
}

std::shared_ptr<const QuantizedMatrix> MixedRows::restore(
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  auto mixed = std::make_shared<MixedRows>();
  mixed->out_features = out_features;
  mixed->in_features = in_features;
  const std::int64_t hot_rows = parameters.get_int_in("hot_rows", 1, out_features - 1);
  const auto table = [&](const char* name, std::int64_t rows) {
    const auto restored = PackedLinear::restore(
        rows,
        in_features,
        parameters.get_object(name),
        [&](const std::string& part) { return parts(fmt::format("{}.{}", name, part)); },
        where + "." + name);
    return as_packed(*restored, where);
  };
  mixed->hot = table(kHot, hot_rows);
  mixed->cold = table(kCold, out_features - hot_rows);
  mixed->row_map = copy_values<std::uint32_t>(
      require_part(parts, "row_map", DType::kU32, {out_features}, where));
  for (const std::uint32_t entry : mixed->row_map) {
    const PackedLinear& target = (entry & kHotBit) != 0 ? mixed->hot : mixed->cold;
    if ((entry & ~kHotBit) >= static_cast<std::uint64_t>(target.out_features)) {
      throw ParseError(
          "a row map points outside its table",
          where + ".row_map",
          fmt::format("expected less than {}, found {}", target.out_features, entry & ~kHotBit),
          "make the checkpoint again");
    }
  }
  return mixed;
}

}  // namespace quern
