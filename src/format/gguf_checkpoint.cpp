// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/formats.h"
#include "format/gguf_config.h"
#include "format/gguf_file.h"
#include "format/gguf_names.h"
#include "quant/ggml_matrix.h"
#include "quant/joined_rows.h"
#include "tensor/divided.h"

#include <fmt/format.h>

#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kConvolution = ".conv1d.weight";

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
class GgufStore : public DividedStore {
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
  [[nodiscard]] std::map<std::string, std::int64_t> divided() const override { return divided_; }
  void note_divided(const std::string& name, std::int64_t parts) { divided_[name] = parts; }

 private:
  const GgufFile& file_;
  std::map<std::string, std::int64_t> divided_;
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
        tensors_(*file_),
        draft_end_(file_->metadata().get_int_or(architecture() + ".block_count", 0)) {
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
    const Stored& stored = found->second;
    const Shape expected = {out_features, in_features};
    const Shape shape = {stored.rows + stored.second_rows, stored.tensor->shape.back()};
    if (shape != expected) {
      throw ParseError(
          "a tensor has the wrong shape",
          place(*stored.tensor),
          fmt::format("expected {}, found {}", shape_text(expected), shape_text(shape)),
          "convert the model again");
    }
    StoredLinear linear;
    if (stored.second != nullptr) {
      linear.quantized = joined(stored);
    } else {
      auto matrix = std::make_shared<GgmlMatrix>(
          matrix_of(*stored.tensor, stored.bytes, out_features, in_features));
      matrix->stored_rows = stored_rows(module + std::string(kWeight), out_features);
      matrix->stored_columns = stored_columns(module + std::string(kWeight));
      linear.quantized = std::move(matrix);
    }
    return linear;
  }

 private:
  // The matrix of a module: a tensor, a slice of one, or the rows of two.
  struct Stored {
    const GgufTensor* tensor = nullptr;
    std::span<const std::byte> bytes;
    std::int64_t rows = 0;
    const GgufTensor* second = nullptr;
    std::int64_t second_rows = 0;
  };

  static GgmlMatrix matrix_of(
      const GgufTensor& tensor,
      std::span<const std::byte> bytes,
      std::int64_t rows,
      std::int64_t columns) {
    GgmlMatrix matrix;
    matrix.out_features = rows;
    matrix.in_features = columns;
    matrix.type = tensor.type;
    matrix.bytes = bytes;
    return matrix;
  }

  [[nodiscard]] std::shared_ptr<const QuantizedMatrix> joined(const Stored& stored) const {
    auto matrix = std::make_shared<JoinedRows>();
    matrix->out_features = stored.rows + stored.second_rows;
    matrix->in_features = stored.tensor->shape.back();
    matrix->first =
        matrix_of(*stored.tensor, stored.tensor->bytes, stored.rows, matrix->in_features);
    matrix->second =
        matrix_of(*stored.second, stored.second->bytes, stored.second_rows, matrix->in_features);
    matrix->rows.resize(static_cast<std::size_t>(matrix->out_features));
    const GgufDeltaRows taken = gguf_delta_rows(delta_shape());
    std::int64_t place = 0;
    for (const std::vector<std::int64_t>* rows : {&taken.qkv, &taken.gate}) {
      for (const std::int64_t row : *rows) {
        matrix->rows.at(static_cast<std::size_t>(row)) = place++;
      }
    }
    return matrix;
  }

  [[nodiscard]] DeltaNetConfig delta_shape() const {
    DeltaNetConfig shape;
    shape.key_heads = config_.at("linear_num_key_heads").get<std::int64_t>();
    shape.value_heads = config_.at("linear_num_value_heads").get<std::int64_t>();
    shape.key_dim = config_.at("linear_key_head_dim").get<std::int64_t>();
    shape.value_dim = config_.at("linear_value_head_dim").get<std::int64_t>();
    return shape;
  }

  [[nodiscard]] const std::string& architecture() const {
    return file_->metadata().get_string("general.architecture");
  }
  [[nodiscard]] bool is_hybrid() const { return config_.contains("linear_num_key_heads"); }

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
    if (is_hybrid()) {
      const std::vector<std::int64_t> order =
          gguf_delta_row_order(architecture(), name, delta_shape());
      if (!order.empty() && static_cast<std::int64_t>(order.size()) != rows) {
        throw ParseError(
            "a tensor has the wrong shape",
            path_.string() + ": " + printable(name),
            fmt::format("expected {} rows, found {}", order.size(), rows),
            "convert the model again");
      }
      return inverse(order);
    }
    const auto head_dim = config_.at("head_dim").get<std::int64_t>();
    const std::vector<std::int64_t> order = gguf_row_order(architecture(), name, rows, head_dim);
    if (!order.empty() && rows % head_dim != 0) {
      throw ParseError(
          "a tensor has the wrong shape",
          path_.string() + ": " + printable(name),
          fmt::format("expected whole heads of {} rows, found {} rows", head_dim, rows),
          "convert the model again");
    }
    return inverse(order);
  }

  static std::vector<std::int64_t> inverse(const std::vector<std::int64_t>& order) {
    std::vector<std::int64_t> stored(order.size());
    for (std::size_t row = 0; row < order.size(); ++row) {
      stored[static_cast<std::size_t>(order[row])] = static_cast<std::int64_t>(row);
    }
    return stored;
  }

  // Where each column stands; empty: in the same place.
  [[nodiscard]] std::vector<std::int64_t> stored_columns(const std::string& name) const {
    if (!is_hybrid() || !name.ends_with(kDeltaOutput)) {
      return {};
    }
    const DeltaNetConfig shape = delta_shape();
    std::vector<std::int64_t> order;
    for (const std::int64_t head : gguf_value_heads(architecture(), shape)) {
      for (std::int64_t i = 0; i < shape.value_dim; ++i) {
        order.push_back(head * shape.value_dim + i);
      }
    }
    return inverse(order);
  }

  void add_tensor(const GgufTensor& tensor) {
    if (tensor.name == kRopeFactorsName || is_draft(tensor.name)) {
      return;  // read by config_from_gguf(); not computed
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
    const std::vector<std::string> modules = gguf_stack_modules(tensor.name);
    if (!modules.empty()) {
      add_stack(tensor, modules);
      return;
    }
    const std::optional<std::string> name = checkpoint_tensor_name(tensor.name, architecture());
    if (!name) {
      unsupported(tensor, "expected a tensor of the decoder, found one of another kind");
    }
    if (architecture() == "qwen3next" && tensor.shape.size() == 2 &&
        (tensor.name.ends_with(".attn_qkv.weight") || tensor.name.ends_with(".attn_gate.weight"))) {
      add_delta_input(tensor, *name);
      return;
    }
    const std::optional<DType> dtype = float_dtype(tensor.type);
    const bool is_matrix =
        tensor.shape.size() == 2 && name->ends_with(kWeight) && !name->ends_with(kConvolution);
    const std::vector<std::int64_t> rows = stored_rows(*name, tensor.shape[0]);
    const bool is_moved = !rows.empty() || !stored_columns(*name).empty();
    if (is_matrix && (!dtype || is_moved)) {
      add_matrix(
          name->substr(0, name->size() - kWeight.size()),
          {&tensor, tensor.bytes, tensor.shape[0], nullptr, 0});
      return;
    }
    if (!dtype) {
      unsupported(
          tensor,
          fmt::format(
              "expected floats outside of matrices, found {}", ggml_type_info(tensor.type).name));
    }
    TensorView view = {*dtype, tensor.shape, tensor.bytes};
    if (name->ends_with(kConvolution) && view.shape.size() == 2) {
      view.shape.insert(view.shape.begin() + 1, 1);
    } else if (name->ends_with(".shared_expert_gate.weight") && view.shape.size() == 1) {
      view.shape.insert(view.shape.begin(), 1);
    }
    const GgufValues change = gguf_values(*name, is_hybrid());
    if (change != GgufValues::kSame) {
      std::vector<float> values = to_float(view);
      from_gguf_values(change, values);
      const std::vector<std::byte> bytes = from_float(values, DType::kF32);
      add_in_order(*name, {DType::kF32, view.shape, bytes}, rows);
    } else if (rows.empty()) {
      tensors_.add(*name, view);
    } else {
      add_in_order(*name, view, rows);
    }
  }

  // Draft layers stand behind those of the decoder.
  [[nodiscard]] bool is_draft(const std::string& name) const {
    constexpr std::string_view kBlock = "blk.";
    constexpr std::size_t kMaxDigits = 6;
    const std::size_t digits = name.find_first_not_of("0123456789", kBlock.size());
    if (!name.starts_with(kBlock) || digits == kBlock.size() || digits == std::string::npos ||
        digits > kBlock.size() + kMaxDigits) {
      return false;
    }
    const std::int64_t block = std::stoll(name.substr(kBlock.size(), digits - kBlock.size()));
    return block >= config_.at("num_hidden_layers").get<std::int64_t>() && block < draft_end_;
  }

  void add_matrix(const std::string& module, const Stored& stored) {
    const auto bytes = static_cast<std::int64_t>(stored.bytes.size());
    matrices_.emplace(module, stored);
    tensors_.add(
        module + ".blocks",
        {DType::kU8, {stored.rows, stored.rows == 0 ? 0 : bytes / stored.rows}, stored.bytes});
  }

  // The experts of a layer: [experts, rows of the modules one below the other, columns].
  void add_stack(const GgufTensor& tensor, const std::vector<std::string>& modules) {
    const auto parts = static_cast<std::int64_t>(modules.size());
    if (tensor.shape.size() != 3 || tensor.shape[1] % parts != 0) {
      unsupported(tensor, "expected three extents, found " + shape_text(tensor.shape));
    }
    const std::int64_t experts = tensor.shape[0];
    const std::int64_t rows = tensor.shape[1] / parts;
    const std::size_t bytes = tensor.bytes.size() / static_cast<std::size_t>(experts * parts);
    const std::optional<DType> dtype = float_dtype(tensor.type);
    tensors_.note_divided(tensor.name, experts * parts);
    for (std::int64_t slice = 0; slice < experts * parts; ++slice) {
      const std::string module =
          with_expert(modules[static_cast<std::size_t>(slice % parts)], slice / parts);
      const auto own = tensor.bytes.subspan(static_cast<std::size_t>(slice) * bytes, bytes);
      if (dtype) {
        tensors_.add(module + std::string(kWeight), {*dtype, {rows, tensor.shape[2]}, own});
      } else {
        add_matrix(module, {&tensor, own, rows, nullptr, 0});
      }
    }
  }

  static std::string with_expert(std::string module, std::int64_t expert) {
    return module.replace(module.find("{}"), 2, std::to_string(expert));
  }

  // Qwen3-Next's in_proj_qkvz: rows of attn_qkv and attn_gate.
  void add_delta_input(const GgufTensor& tensor, const std::string& name) {
    const bool is_gate = tensor.name.ends_with(".attn_gate.weight");
    const std::string qkv =
        is_gate ? tensor.name.substr(0, tensor.name.rfind(".attn_gate")) + ".attn_qkv.weight"
                : tensor.name;
    if (is_gate) {
      if (file_->find(qkv) == nullptr) {
        unsupported(tensor, "expected " + qkv + " beside it, found nothing");
      }
      return;
    }
    const std::string gate_name =
        tensor.name.substr(0, tensor.name.rfind(".attn_qkv")) + ".attn_gate.weight";
    const GgufTensor* gate = file_->find(gate_name);
    const DeltaNetConfig shape = delta_shape();
    if (gate == nullptr || gate->shape != Shape{shape.value_width(), tensor.shape[1]} ||
        tensor.shape[0] != shape.channels() || !can_dequantize(gate->type)) {
      unsupported(
          tensor,
          fmt::format(
              "expected {} rows, and {} in {}", shape.channels(), shape.value_width(), gate_name));
    }
    const std::string module = name.substr(0, name.rfind(".in_proj_qkv")) + ".in_proj_qkvz";
    add_matrix(module, {&tensor, tensor.bytes, tensor.shape[0], gate, gate->shape[0]});
    tensors_.add(
        module + ".gate_blocks",
        {DType::kU8,
         {gate->shape[0], static_cast<std::int64_t>(gate->bytes.size()) / gate->shape[0]},
         gate->bytes});
  }

  // A copy of floats whose rows stand in another order in the file; without `rows` in the same.
  void add_in_order(
      const std::string& name, const TensorView& view, const std::vector<std::int64_t>& rows) {
    if (rows.empty()) {
      tensors_.add_owned(name, view, {view.bytes.begin(), view.bytes.end()});
      return;
    }
    const std::size_t width = view.bytes.size() / rows.size();
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
  std::int64_t draft_end_ = 0;  // blocks of the file, those of draft layers included
  std::map<std::string, Stored> matrices_;  // by module
};

}  // namespace

std::unique_ptr<Checkpoint> open_gguf(const std::filesystem::path& path) {
  return std::make_unique<GgufCheckpoint>(path);
}

}  // namespace quern
