// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/formats.h"
#include "format/packed_checkpoint.h"
#include "format/quern_container.h"
#include "quant/activation.h"
#include "quant/quantized_matrix.h"

#include <fmt/format.h>

#include <map>
#include <utility>

namespace quern {
namespace {

// How one module is put together.
struct ContainerModule {
  std::string kind;
  Json parameters;
  std::string where;
  std::shared_ptr<const ActivationScheme> activation;
};

std::map<std::string, ContainerModule> read_modules(const Json& json, const std::string& where) {
  const JsonReader reader(json, where);
  const std::int64_t version = reader.get_int("version");
  if (version != kContainerVersion) {
    throw UnsupportedError(
        "a container of another version",
        reader.place("version"),
        fmt::format("expected {}, found {}", kContainerVersion, version),
        "use a newer version of quern");
  }
  std::map<std::string, ContainerModule> modules;
  const JsonReader entries = reader.get_object("modules");
  for (const auto& [name, value] : entries.json().items()) {
    const JsonReader entry(value, entries.place(printable(name)));
    ContainerModule& module = modules[name];
    module.kind = entry.get_string("kind");
    module.parameters = entry.get_object("parameters").json();
    module.where = entry.place("parameters");
    if (entry.has("activation")) {
      module.activation = std::make_shared<const ActivationScheme>(
          read_activation(entry.get_object("activation"), true));
    }
  }
  return modules;
}

class QuernCheckpoint : public PackedCheckpoint {
 public:
  QuernCheckpoint(CheckpointSource source, std::map<std::string, ContainerModule> modules)
      : PackedCheckpoint(std::move(source)), modules_(std::move(modules)) {
    for (const auto& [name, module] : modules_) {
      if (tensors().find(name + ".weight") != nullptr) {
        throw ParseError(
            "a module is stored twice",
            place(name),
            "expected the parts that the configuration names or .weight, found both",
            "remove the one that does not belong to the model");
      }
    }
  }

  [[nodiscard]] std::string format() const override { return "quern"; }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    return modules_.contains(module);
  }

 private:
  [[nodiscard]] StoredLinear load_quantized(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    const ContainerModule& entry = modules_.at(module);
    StoredLinear linear;
    linear.quantized = restore_matrix(
        entry.kind,
        out_features,
        in_features,
        JsonReader(entry.parameters, entry.where),
        [&](const std::string& part) { return tensors().find(module + "." + part); },
        place(module));
    linear.activation = entry.activation;
    return linear;
  }

  std::map<std::string, ContainerModule> modules_;
};

}  // namespace

bool is_quern(const CheckpointSource& source) {
  return source.method == "quern";
}

std::unique_ptr<Checkpoint> open_quern(CheckpointSource source) {
  auto modules = read_modules(source.quantization, source.quantization_where);
  return std::make_unique<QuernCheckpoint>(std::move(source), std::move(modules));
}

}  // namespace quern
