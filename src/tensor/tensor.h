// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

enum class DType {
  kBool,
  kU8,
  kI8,
  kI16,
  kU16,
  kI32,
  kU32,
  kI64,
  kU64,
  kF8E4M3,
  kF8E5M2,
  kF16,
  kBF16,
  kF32,
  kF64
};

[[nodiscard]] std::size_t dtype_size(DType dtype) noexcept;  // bytes of one value
[[nodiscard]] std::string_view dtype_name(
    DType dtype) noexcept;  // safetensors' names: "BF16", "I32"
[[nodiscard]] std::optional<DType> dtype_from_name(std::string_view name) noexcept;
[[nodiscard]] bool is_16_or_32_bit_float(DType dtype) noexcept;  // F16, BF16, F32

using Shape = std::vector<std::int64_t>;

[[nodiscard]] std::string shape_text(const Shape& shape);  // "[256, 768]"

// Values that somebody else owns: row-major, the last dimension contiguous. `bytes` has exactly
// dtype_size * product(shape) bytes (checked where views are made).
struct TensorView {
  DType dtype = DType::kF32;
  Shape shape;
  std::span<const std::byte> bytes;

  [[nodiscard]] std::int64_t count() const noexcept;
  // Rows of a 2-D tensor [begin, end).
  [[nodiscard]] TensorView rows(std::int64_t begin, std::int64_t end) const;
};

// Converts F16, BF16 or F32 values to float. `out` has view.count() elements.
void to_float(const TensorView& view, std::span<float> out);
[[nodiscard]] std::vector<float> to_float(const TensorView& view);
// Rounds floats to F16, BF16 or F32 bytes (to nearest even).
[[nodiscard]] std::vector<std::byte> from_float(std::span<const float> values, DType dtype);

// A set of named tensors in mapped files; validated once when it was opened, read-only afterwards.
// Iteration is in name order.
class TensorStore {
 public:
  virtual ~TensorStore() = default;

  [[nodiscard]] virtual const TensorView* find(const std::string& name) const = 0;
  [[nodiscard]] virtual const std::map<std::string, TensorView>& tensors() const = 0;
  // Gives mapped pages of a tensor back to the system; a later read maps them again.
  virtual void release(const TensorView& view) const = 0;

  // Throws ParseError, naming the tensor, when it is missing or its shape differs.
  [[nodiscard]] const TensorView& require(const std::string& name, const Shape& shape) const;
  // The same for values that are computed with: UnsupportedError unless they are F16, BF16 or F32.
  [[nodiscard]] const TensorView& require_float(const std::string& name, const Shape& shape) const;
};

}  // namespace quern
