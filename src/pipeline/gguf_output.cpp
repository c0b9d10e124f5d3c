// SPDX-License-Identifier: Apache-2.0
#include "pipeline/gguf_output.h"

#include "base/error.h"
#include "quant/ggml_matrix.h"

#include <cstring>
#include <map>
#include <utility>

namespace quern {
namespace {

// The rows of a tensor in the order of the file.
std::vector<std::byte> in_file_order(
    std::span<const std::byte> bytes, std::int64_t rows, const std::vector<std::int64_t>& order) {
  if (order.empty()) {
    return {bytes.begin(), bytes.end()};
  }
  const std::size_t width = bytes.size() / static_cast<std::size_t>(rows);
  std::vector<std::byte> ordered(bytes.size());
  for (std::size_t row = 0; row < order.size(); ++row) {
    std::memcpy(
        ordered.data() + row * width,
        bytes.data() + static_cast<std::size_t>(order[row]) * width,
        width);
  }
  return ordered;
}

}  // namespace

void write_gguf_output(
    const PreparedRun& run, const PartSource& parts, const std::filesystem::path& file) {
  const GgufPlan& plan = *run.gguf;
  GgufWriter writer(file, plan.layout);
  std::map<std::string, const GgufEntry*> by_module;
  std::map<std::string, const GgufEntry*> by_tensor;
  for (const GgufEntry& entry : plan.entries) {
    if (entry.linear != nullptr) {
      by_module.emplace(entry.linear->name, &entry);
    } else if (!entry.source.empty()) {
      by_tensor.emplace(entry.source, &entry);
    } else {
      writer.write(entry.declaration.name, std::as_bytes(std::span(entry.values)));
    }
  }
  const auto write = [&](const GgufEntry& entry, std::span<const std::byte> bytes) {
    const std::int64_t rows = entry.declaration.shape.front();
    writer.write(entry.declaration.name, in_file_order(bytes, rows, entry.row_order));
  };
  const auto write_floats = [&](const GgufEntry& entry, const TensorView& view) {
    if (entry.declaration.type == GgmlType::kF32) {
      const std::vector<float> values = to_float(view);
      write(entry, std::as_bytes(std::span(values)));
    } else {
      write(entry, view.bytes);
    }
  };
  for (const std::string& part : all_parts(run.graph)) {
    const QuantizedBlock done = parts(part);
    for (const ReplacedTensor& tensor : done.tensors) {
      const auto found = by_tensor.extract(tensor.name);
      write_floats(*found.mapped(), {tensor.dtype, tensor.shape, tensor.bytes});
    }
    for (const QuantizedLinear& linear : done.linears) {
      const auto* matrix = dynamic_cast<const GgmlMatrix*>(linear.matrix.get());
      if (matrix == nullptr) {
        throw Error(
            ErrorKind::kFailed,
            "a matrix was not rounded to a ggml type",
            linear.plan->name,
            std::string(linear.matrix->kind()),
            "report this as a bug");
      }
      write(*by_module.at(linear.plan->name), matrix->bytes);
    }
  }
  const TensorStore& store = run.source->tensors();
  for (const auto& [name, entry] : by_tensor) {
    const TensorView* view = store.find(name);
    write_floats(*entry, *view);
    store.release(*view);
  }
  writer.finish();
}

}  // namespace quern
