// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/checkpoint.h"
#include "format/gguf_config.h"
#include "format/gguf_file.h"
#include "format/gguf_names.h"
#include "format/gguf_tokenizer.h"
#include "golden.h"
#include "quant/ggml_quantize.h"

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace quern::testing {

// Which type a matrix gets.
using GgmlChoice = std::function<GgmlType(const Linear& linear)>;

inline GgmlChoice all_of(GgmlType type) {
  return [type](const Linear&) { return type; };
}

// A GGUF file of a safetensors model, tensor after tensor: matrices as `choose` says, everything
// else in F32.
class GgufModelWriter {
 public:
  GgufModelWriter(const std::filesystem::path& directory, GgmlChoice choose)
      : source_(open_checkpoint(directory)),
        graph_(build_graph(source_->config(), source_->config_place())),
        choose_(std::move(choose)),
        metadata_(gguf_metadata(source_->config(), graph_, "test", 0)),
        architecture_(metadata_.get_string("general.architecture")) {
    if (std::filesystem::exists(directory / "tokenizer.json")) {
      add_gguf_tokenizer(metadata_, directory, source_->config(), graph_.config.vocab_size);
    }
  }

  GgufMetadata& metadata() { return metadata_; }

  void write(const std::filesystem::path& target) {
    tensors_.clear();
    add_all();
    std::vector<GgufDeclaration> declarations;
    for (const Tensor& tensor : tensors_) {
      declarations.push_back(tensor.declaration);
    }
    GgufWriter writer(target, plan_gguf(metadata_, declarations));
    for (const Tensor& tensor : tensors_) {
      writer.write(tensor.declaration.name, tensor.bytes);
    }
    writer.finish();
  }

 private:
  struct Tensor {
    GgufDeclaration declaration;
    std::vector<std::byte> bytes;
  };

  void add_all() {
    const std::vector<float> factors = gguf_rope_factors(source_->config(), graph_);
    if (!factors.empty()) {
      const auto bytes = std::as_bytes(std::span(factors));
      tensors_.push_back(
          {{kRopeFactorsName, GgmlType::kF32, {static_cast<std::int64_t>(factors.size())}},
           {bytes.begin(), bytes.end()}});
    }
    add(graph_.embedding.weight(), choose_(graph_.embedding));
    if (!graph_.head_tied) {
      add(graph_.head.weight(), choose_(graph_.head));
    }
    add(graph_.final_norm.tensor, GgmlType::kF32);
    for (const Block& block : graph_.blocks) {
      add(block.attention_norm.tensor, GgmlType::kF32);
      add(block.mlp_norm.tensor, GgmlType::kF32);
      if (block.has_qk_norm) {
        add(block.q_norm.tensor, GgmlType::kF32);
        add(block.k_norm.tensor, GgmlType::kF32);
      }
      for (const Linear& linear : block.linears) {
        add(linear.weight(), choose_(linear));
        if (linear.has_bias) {
          add(linear.module + ".bias", GgmlType::kF32);
        }
      }
    }
  }

  void add(const std::string& name, GgmlType type) {
    const TensorView& view = *source_->tensors().find(name);
    const std::vector<float> values = to_float(view);
    const auto width = static_cast<std::size_t>(view.shape.back());
    const std::size_t rows = values.size() / width;
    const std::vector<std::int64_t> order =
        gguf_row_order(architecture_, name, view.shape[0], graph_.config.head_dim);
    Tensor tensor = {{gguf_tensor_name(name).value(), type, view.shape}, {}};
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t from =
          order.empty() || view.shape.size() == 1 ? row : static_cast<std::size_t>(order[row]);
      append_row(std::span(values).subspan(from * width, width), type, tensor.bytes);
    }
    if (view.shape.size() == 1 && !order.empty()) {
      reorder(order, tensor.bytes);
    }
    tensors_.push_back(std::move(tensor));
  }

  static void reorder(const std::vector<std::int64_t>& order, std::vector<std::byte>& bytes) {
    const std::vector<std::byte> old = bytes;
    const std::size_t size = bytes.size() / order.size();
    for (std::size_t row = 0; row < order.size(); ++row) {
      std::copy_n(
          old.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(order[row]) * size),
          size,
          bytes.begin() + static_cast<std::ptrdiff_t>(row * size));
    }
  }

  static void append_row(std::span<const float> row, GgmlType type, std::vector<std::byte>& bytes) {
    std::vector<std::byte> packed;
    if (const GgmlLayout* layout = ggml_layout(type)) {
      const std::vector<float> ones(row.size(), 1.0F);
      packed.resize(*ggml_tensor_bytes(type, {static_cast<std::int64_t>(row.size())}));
      pack_row(type, quantize_row(test_kernels(), *layout, row, ones), packed);
    } else {
      packed = from_float(
          row,
          type == GgmlType::kF32   ? DType::kF32
          : type == GgmlType::kF16 ? DType::kF16
                                   : DType::kBF16);
    }
    bytes.insert(bytes.end(), packed.begin(), packed.end());
  }

  std::unique_ptr<Checkpoint> source_;
  ModelGraph graph_;
  GgmlChoice choose_;
  GgufMetadata metadata_;
  std::string architecture_;
  std::vector<Tensor> tensors_;
};

inline void write_gguf_model(
    const std::filesystem::path& directory,
    const GgmlChoice& choose,
    const std::filesystem::path& target) {
  GgufModelWriter(directory, choose).write(target);
}

}  // namespace quern::testing
