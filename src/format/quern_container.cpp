// SPDX-License-Identifier: Apache-2.0
#include "format/quern_container.h"

#include "base/error.h"
#include "format/packing.h"
#include "quant/activation.h"
#include "quant/billm_matrix.h"
#include "quant/ggml_matrix.h"
#include "quant/mixed_rows.h"
#include "quant/packed_linear.h"
#include "quern/version.h"

#include <fmt/format.h>

#include <array>
#include <stdexcept>
#include <utility>

namespace quern {
namespace {

// What the parts of a kind of matrix will be, before there is one.
struct ContainerKind {
  std::string_view name;
  std::vector<TensorDeclaration> (*parts)(const OutputModule& module);
  Json (*parameters)(const OutputModule& module);
};

// Names without the module's.
std::vector<TensorDeclaration> packed_parts(const OutputModule& module) {
  const QuantScheme& scheme = *module.scheme;
  const Shape cells = {module.out_features, scheme.groups(module.in_features)};
  std::vector<TensorDeclaration> parts = {
      {"codes", DType::kU32, {module.out_features, words_for(module.in_features, scheme.bits)}},
      {"scales", module.scale_dtype, cells}};
  if (!scheme.symmetric) {
    parts.push_back({"zeros", DType::kU8, cells});
  }
  if (module.has_group_index) {
    parts.push_back({"group_index", DType::kI32, {module.in_features}});
  }
  return parts;
}

Json packed_parameters(const OutputModule& module) {
  PackedLinear packed;
  packed.scheme = *module.scheme;
  packed.scale_dtype = module.scale_dtype;
  return packed.parameters();
}

// The two tables of mixed rows.
std::array<std::pair<const char*, OutputModule>, 2> mixed_tables(const OutputModule& module) {
  OutputModule hot = module;
  hot.out_features = module.hot_rows;
  hot.scheme->bits = MixedRows::kHotBits;
  OutputModule cold = module;
  cold.out_features = module.out_features - module.hot_rows;
  return {{{MixedRows::kHot, hot}, {MixedRows::kCold, cold}}};
}

std::vector<TensorDeclaration> mixed_parts(const OutputModule& module) {
  std::vector<TensorDeclaration> parts = {{"row_map", DType::kU32, {module.out_features}}};
  for (const auto& [name, table] : mixed_tables(module)) {
    for (TensorDeclaration& part : packed_parts(table)) {
      part.name = fmt::format("{}.{}", name, part.name);
      parts.push_back(std::move(part));
    }
  }
  return parts;
}

Json mixed_parameters(const OutputModule& module) {
  Json parameters = {{"hot_rows", module.hot_rows}};
  for (const auto& [name, table] : mixed_tables(module)) {
    parameters[name] = packed_parameters(table);
  }
  return parameters;
}

std::vector<TensorDeclaration> billm_parts(const OutputModule& module) {
  std::vector<TensorDeclaration> declarations;
  for (const MatrixPart& part : BillmMatrix::empty_parts(
           module.out_features,
           module.in_features,
           module.scheme->group_width(module.in_features))) {
    declarations.push_back({part.name, part.dtype, part.shape});
  }
  return declarations;
}

Json billm_parameters(const OutputModule& module) {
  BillmMatrix matrix;
  matrix.block = module.scheme->group_width(module.in_features);
  return matrix.parameters();
}

std::vector<TensorDeclaration> ggml_parts(const OutputModule& module) {
  const GgmlTypeInfo& type = ggml_type_info(*module.scheme->ggml);
  return {
      {"blocks", DType::kU8, {module.out_features, module.in_features / type.block * type.bytes}}};
}

Json ggml_parameters(const OutputModule& module) {
  GgmlMatrix matrix;
  matrix.type = *module.scheme->ggml;
  return matrix.parameters();
}

// One line a kind.
constexpr std::array kKinds = {
    ContainerKind{PackedLinear::kKind, packed_parts, packed_parameters},
    ContainerKind{MixedRows::kKind, mixed_parts, mixed_parameters},
    ContainerKind{BillmMatrix::kKind, billm_parts, billm_parameters},
    ContainerKind{GgmlMatrix::kKind, ggml_parts, ggml_parameters},
};

const ContainerKind& kind_of(const OutputModule& module) {
  for (const ContainerKind& kind : kKinds) {
    if (kind.name == module.kind) {
      return kind;
    }
  }
  throw UnsupportedError(
      "a kind of quantized matrix that cannot be declared",
      module.name,
      fmt::format("found {}", module.kind),
      "use another method");
}

}  // namespace

std::vector<TensorDeclaration> container_declarations(const OutputModule& module) {
  std::vector<TensorDeclaration> declarations = kind_of(module).parts(module);
  for (TensorDeclaration& declaration : declarations) {
    declaration.name = module.name + "." + declaration.name;
  }
  return declarations;
}

std::vector<std::vector<std::byte>> pack_container(
    const QuantizedMatrix& matrix, const OutputModule& module) {
  const std::vector<TensorDeclaration> declared = container_declarations(module);
  std::vector<MatrixPart> parts = matrix.parts();
  // Scales that were kept to a narrower type, so that another format holds them too.
  for (std::size_t i = 0; i < parts.size() && i < declared.size(); ++i) {
    MatrixPart& part = parts[i];
    if (part.dtype != declared[i].dtype && part.shape == declared[i].shape &&
        is_16_or_32_bit_float(part.dtype) && is_16_or_32_bit_float(declared[i].dtype)) {
      part.bytes = from_float(to_float({part.dtype, part.shape, part.bytes}), declared[i].dtype);
      part.dtype = declared[i].dtype;
    }
  }
  if (parts.size() != declared.size()) {
    throw std::logic_error("a matrix has other parts than were declared: " + module.name);
  }
  std::vector<std::vector<std::byte>> tensors;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (declared[i].name != module.name + "." + parts[i].name ||
        declared[i].dtype != parts[i].dtype || declared[i].shape != parts[i].shape) {
      throw std::logic_error("a part has another form than was declared: " + declared[i].name);
    }
    tensors.push_back(std::move(parts[i].bytes));
  }
  return tensors;
}

void check_container_holds(const OutputModule& module) {
  if (module.scheme->bits < 1 || module.scheme->bits > 8) {
    throw UnsupportedError(
        "the container does not hold this width",
        module.name,
        fmt::format("expected 1 to 8 bits, found {}", module.scheme->bits),
        "choose another --bits");
  }
}

Json container_config_json(std::span<const OutputModule> modules, const Json& meta) {
  Json named = Json::object();
  for (const OutputModule& module : modules) {
    if (!module.scheme) {
      continue;
    }
    Json& entry = named[module.name];
    entry = {{"kind", module.kind}, {"parameters", kind_of(module).parameters(module)}};
    if (module.activation.active()) {
      entry["activation"] = activation_json(module.activation);
    }
  }
  return {
      {"quant_method", "quern"},
      {"version", kContainerVersion},
      {"quantizer", fmt::format("quern:{}", kVersion)},
      {"meta", meta},
      {"modules", std::move(named)}};
}

}  // namespace quern
