// SPDX-License-Identifier: Apache-2.0
#include "pipeline/gguf_output.h"

#include "base/error.h"
#include "quant/ggml_matrix.h"

#include <cstring>
#include <map>
#include <utility>

namespace quern {
namespace {

// Where a tensor of the source goes.
struct Place {
  const GgufEntry* entry = nullptr;
  std::size_t piece = 0;
};
using Places = std::multimap<std::string, Place>;  // by the name of the source's tensor

Places places_of(const GgufPlan& plan) {
  Places places;
  for (const GgufEntry& entry : plan.entries) {
    for (std::size_t i = 0; i < entry.pieces.size(); ++i) {
      places.emplace(entry.pieces[i].source, Place{&entry, i});
    }
  }
  return places;
}

// The rows of a tensor that a piece takes, in its order.
std::vector<std::byte> rows_of_piece(
    std::span<const std::byte> bytes, std::int64_t rows, const std::vector<std::int64_t>& taken) {
  const std::size_t width = bytes.size() / static_cast<std::size_t>(rows);
  std::vector<std::byte> ordered(taken.size() * width);
  for (std::size_t row = 0; row < taken.size(); ++row) {
    std::memcpy(
        ordered.data() + row * width,
        bytes.data() + static_cast<std::size_t>(taken[row]) * width,
        width);
  }
  return ordered;
}

// Rows with their heads of columns in another order.
std::vector<std::byte> heads_of_rows(
    std::span<const std::byte> bytes, std::int64_t rows, const std::vector<std::int64_t>& heads) {
  const std::size_t width = bytes.size() / static_cast<std::size_t>(rows);
  std::vector<std::byte> ordered;
  ordered.reserve(bytes.size());
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::vector<std::byte> moved = rows_of_piece(
        bytes.subspan(static_cast<std::size_t>(row) * width, width),
        static_cast<std::int64_t>(heads.size()),
        heads);
    ordered.insert(ordered.end(), moved.begin(), moved.end());
  }
  return ordered;
}

// `bytes` are those of the whole tensor of the source, `rows` rows, in the type of the file.
void write_piece(
    const Place& place, std::span<const std::byte> bytes, std::int64_t rows, GgufWriter& writer) {
  const GgufPiece& piece = place.entry->pieces[place.piece];
  std::vector<std::byte> ordered;
  if (!piece.rows.empty()) {
    ordered = rows_of_piece(bytes, rows, piece.rows);
    bytes = ordered;
  }
  if (!piece.column_heads.empty()) {
    // Each row is cut into its heads.
    ordered = heads_of_rows(bytes, rows, piece.column_heads);
    bytes = ordered;
  }
  writer.write_piece(place.entry->declaration.name, place.piece * bytes.size(), bytes);
}

void write_floats(const Place& place, const TensorView& view, GgufWriter& writer) {
  const std::int64_t rows = view.shape.front();
  if (place.entry->declaration.type == GgmlType::kF32) {
    std::vector<float> values = to_float(view);
    to_gguf_values(place.entry->change, values);
    write_piece(place, std::as_bytes(std::span(values)), rows, writer);
  } else {
    write_piece(place, view.bytes, rows, writer);
  }
}

}  // namespace

void write_gguf_output(
    const PreparedRun& run, const PartSource& parts, const std::filesystem::path& file) {
  const GgufPlan& plan = *run.gguf;
  GgufWriter writer(file, plan.layout);
  for (const GgufEntry& entry : plan.entries) {
    if (entry.pieces.empty()) {
      writer.write(entry.declaration.name, std::as_bytes(std::span(entry.values)));
    }
  }
  Places open = places_of(plan);
  // Calls `write` for every place of a tensor, which is done then.
  const auto finish = [&](const std::string& tensor, const auto& write) {
    const auto [first, last] = open.equal_range(tensor);
    for (auto place = first; place != last; ++place) {
      write(place->second);
    }
    open.erase(first, last);
  };
  for (const std::string& part : all_parts(run.graph)) {
    const QuantizedBlock done = parts(part);
    for (const ReplacedTensor& tensor : done.tensors) {
      finish(tensor.name, [&](const Place& place) {
        write_floats(place, {tensor.dtype, tensor.shape, tensor.bytes}, writer);
      });
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
      finish(linear.plan->name + ".weight", [&](const Place& place) {
        write_piece(place, matrix->bytes, matrix->out_features, writer);
      });
    }
  }
  const TensorStore& store = run.source->tensors();
  while (!open.empty()) {
    const std::string name = open.begin()->first;
    const TensorView* view = store.find(name);
    finish(name, [&](const Place& place) { write_floats(place, *view, writer); });
    store.release(*view);
  }
  writer.finish();
}

}  // namespace quern
