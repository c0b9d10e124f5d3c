// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/formats.h"
#include "format/gguf_config.h"
#include "format/gguf_file.h"
#include "format/gguf_names.h"
#include "quant/ggml_matrix.h"

#include <fmt/format.h>

#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kWeight = ".weight";

std::optional<DType> float_dtype(GgmlType type) {
  switch (type) {
    case GgmlType::kF32: return DType::kF32;
    case GgmlType::kF16: return DType::kF16;
    case GgmlType::kBF16: return DType::kBF16;
    default: return std::nullopt;
  }
}

// The tensors of a GGUF file under the names of checkpoints: float ones as they are, matrices in
// blocks as MODULE.blocks U8 [rows, bytes of a row].
class GgufStore : public TensorStore {
 public:
  explicit GgufStore(const GgufFile& file) : file_(file) {}

  void add(const std::string& name, TensorView view) { tensors_.emplace(name, std::move(view)); }
  void add_owned(const std::string& name, TensorView view, std::vector<std::byte> bytes) {
    owned_.push_back(std::move(bytes));
    view.bytes = owned_.back();
    add(name, std::move(view));
  }

  [[nodiscard]] const TensorView* find(const std::string& name) const override {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }
  [[nodiscard]] const std::map<std::string, TensorView>& tensors() const override {
    return tensors_;
  }
  void release(const TensorView& view) const override { file_.release(view.bytes); }

 private:
  const GgufFile& file_;
  std::map<std::string, TensorView> tensors_;
  std::vector<std::vector<std::byte>> owned_;
};

class GgufCheckpoint : public Checkpoint {
 public:
  explicit GgufCheckpoint(const std::filesystem::path& path)
      : path_(path),
        directory_(path.has_parent_path() ? path.parent_path() : std::filesystem::path(".")),
        file_(GgufFile::open(path)),
        config_(config_from_gguf(*file_)),
        tensors_(*file_) {
    for (const GgufTensor& tensor : file_->tensors()) {
      add_tensor(tensor);
    }
  }

  [[nodiscard]] const std::filesystem::path& directory() const override { return directory_; }
  [[nodiscard]] const Json& config() const override { return config_; }
  [[nodiscard]] std::string config_place() const override { return path_.string(); }
  [[nodiscard]] std::vector<std::filesystem::path> self_contained_files() const override {
    std::vector<std::filesystem::path> paths;
    for (const MappedFile& file : file_->files()) {
      paths.push_back(file.path());
    }
    return paths;
  }
  [[nodiscard]] const TensorStore& tensors() const override { return tensors_; }
  [[nodiscard]] std::string format() const override { return "gguf"; }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    return matrices_.contains(module);
  }

  [[nodiscard]] StoredLinear load_linear(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    const auto found = matrices_.find(module);
    if (found == matrices_.end()) {
      return load_dense_linear(tensors_, module, out_features, in_features);
    }
    const GgufTensor& tensor = *found->second;
    const Shape expected = {out_features, in_features};
    if (tensor.shape != expected) {
      throw ParseError(
          "a tensor has the wrong shape",
          place(tensor),
          fmt::format("expected {}, found {}", shape_text(expected), shape_text(tensor.shape)),
          "convert the model again");
    }
    auto matrix = std::make_shared<GgmlMatrix>();
    matrix->out_features = out_features;
    matrix->in_features = in_features;
    matrix->type = tensor.type;
    matrix->bytes = tensor.bytes;
    matrix->stored_rows = stored_rows(module + std::string(kWeight), out_features);
    StoredLinear linear;
    linear.quantized = std::move(matrix);
    return linear;
  }

 private:
  [[nodiscard]] std::string place(const GgufTensor& tensor) const {
    return path_.string() + ": tensor " + printable(tensor.name);
  }

  [[noreturn]] void unsupported(const GgufTensor& tensor, const std::string& reason) const {
    throw UnsupportedError(
        "a tensor that quern does not compute with",
        place(tensor),
        reason,
        "use another GGUF file of the model, such as Q4_K_M, or its safetensors release");
  }

  // Where each row of a tensor of the checkpoint stands in the file; empty: in the same place.
  [[nodiscard]] std::vector<std::int64_t> stored_rows(
      const std::string& name, std::int64_t rows) const {
    const auto head_dim = config_.at("head_dim").get<std::int64_t>();
    const std::vector<std::int64_t> order =
        gguf_row_order(config_.at("model_type").get<std::string>(), name, rows, head_dim);
    if (!order.empty() && rows % head_dim != 0) {
      throw ParseError(
          "a tensor has the wrong shape",
          path_.string() + ": " + printable(name),
          fmt::format("expected whole heads of {} rows, found {} rows", head_dim, rows),
          "convert the model again");
    }
    std::vector<std::int64_t> stored(order.size());
    for (std::size_t row = 0; row < order.size(); ++row) {
      stored[static_cast<std::size_t>(order[row])] = static_cast<std::int64_t>(row);
    }
    return stored;
  }

  void add_tensor(const GgufTensor& tensor) {
    if (tensor.name == kRopeFactorsName) {
      return;  // read by config_from_gguf()
    }
    const std::optional<std::string> name = checkpoint_tensor_name(tensor.name);
    if (!name) {
      unsupported(tensor, "expected a tensor of a dense decoder, found one of another kind");
    }
    if (tensor.bytes.empty()) {
      unsupported(tensor, "expected values, found none");
    }
    if (!can_dequantize(tensor.type)) {
      unsupported(
          tensor,
          fmt::format(
              "expected floats, Q2_K to Q8_0, IQ4 or MXFP4, found {}",
              ggml_type_info(tensor.type).name));
    }
    const std::optional<DType> dtype = float_dtype(tensor.type);
    const bool is_matrix = tensor.shape.size() == 2 && name->ends_with(kWeight);
    const std::vector<std::int64_t> rows = stored_rows(*name, tensor.shape[0]);
    if (is_matrix && (!dtype || !rows.empty())) {
      add_matrix(tensor, name->substr(0, name->size() - kWeight.size()));
      return;
    }
    if (!dtype) {
      unsupported(
          tensor,
          fmt::format(
              "expected floats outside of matrices, found {}", ggml_type_info(tensor.type).name));
    }
    const TensorView view = {*dtype, tensor.shape, tensor.bytes};
    if (rows.empty()) {
      tensors_.add(*name, view);
    } else {
      add_in_order(*name, view, rows);
    }
  }

  void add_matrix(const GgufTensor& tensor, const std::string& module) {
    const std::int64_t rows = tensor.shape[0];
    const auto bytes = static_cast<std::int64_t>(tensor.bytes.size());
    matrices_.emplace(module, &tensor);
    tensors_.add(
        module + ".blocks", {DType::kU8, {rows, rows == 0 ? 0 : bytes / rows}, tensor.bytes});
  }

  // A vector whose values stand in another order in the file.
  void add_in_order(
      const std::string& name, const TensorView& view, const std::vector<std::int64_t>& rows) {
    const std::size_t width = dtype_size(view.dtype);
    std::vector<std::byte> bytes(view.bytes.size());
    for (std::size_t row = 0; row < rows.size(); ++row) {
      std::memcpy(
          bytes.data() + row * width,
          view.bytes.data() + static_cast<std::size_t>(rows[row]) * width,
          width);
    }
    tensors_.add_owned(name, view, std::move(bytes));
  }

  std::filesystem::path path_;
  std::filesystem::path directory_;
  std::unique_ptr<GgufFile> file_;
  Json config_;
  GgufStore tensors_;
  std::map<std::string, const GgufTensor*> matrices_;  // by module
};

}  // namespace

std::unique_ptr<Checkpoint> open_gguf(const std::filesystem::path& path) {
  return std::make_unique<GgufCheckpoint>(path);
}

}  // namespace quern
