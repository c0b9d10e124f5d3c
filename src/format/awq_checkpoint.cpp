// SPDX-License-Identifier: Apache-2.0
#include "format/awq.h"
#include "format/formats.h"
#include "format/packed_checkpoint.h"

#include <utility>

namespace quern {
namespace {

constexpr const char* kQweight = ".qweight";

// Which modules are quantized is what the tensors say: readers disagree on what an entry of
// modules_to_not_convert matches (a part of the name, its end, an expression from its start).
class AwqCheckpoint : public PackedCheckpoint {
 public:
  AwqCheckpoint(CheckpointSource source, AwqConfig config)
      : PackedCheckpoint(std::move(source)), awq_(std::move(config)) {
    for (const std::string& module : modules_with(kQweight)) {
      check_packed(module, kQweight);
      for (const char* tensor : {".qzeros", ".scales"}) {
        (void)part(module, tensor);
      }
    }
  }

  [[nodiscard]] std::string format() const override { return "awq"; }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    return tensors().find(module + kQweight) != nullptr;
  }

 private:
  [[nodiscard]] StoredLinear load_quantized(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    const AwqTensors stored{
        part(module, kQweight), part(module, ".qzeros"), part(module, ".scales")};
    StoredLinear linear;
    linear.quantized = std::make_shared<const PackedLinear>(
        unpack_awq(stored, awq_.scheme, out_features, in_features, place(module)));
    return linear;
  }

  AwqConfig awq_;
};

}  // namespace

bool is_awq(const CheckpointSource& source) {
  return source.method == "awq";
}

std::unique_ptr<Checkpoint> open_awq(CheckpointSource source) {
  AwqConfig config = read_awq_config(source.quantization, source.quantization_where);
  return std::make_unique<AwqCheckpoint>(std::move(source), std::move(config));
}

}  // namespace quern
