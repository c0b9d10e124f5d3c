// SPDX-License-Identifier: Apache-2.0
#include "format/output_format.h"

#include "base/error.h"
#include "format/gptq.h"
#include "format/gptq_config.h"

#include <array>
#include <utility>

namespace quern {
namespace {

template <GptqVersion kVersion>
StorageRules gptq_storage(DType) {
  return {DType::kF16, kVersion == GptqVersion::kV1};
}

template <GptqVersion kVersion>
void check(
    const QuantScheme& scheme, std::int64_t out, std::int64_t in, const std::string& module) {
  check_gptq_holds(scheme, kVersion, out, in, module);
}

template <GptqVersion kVersion>
std::vector<std::vector<std::byte>> pack(const QuantizedMatrix& matrix, const std::string& module) {
  GptqBytes bytes = pack_gptq(as_packed(matrix, module), kVersion, module);
  std::vector<std::vector<std::byte>> tensors;
  tensors.push_back(std::move(bytes.qweight));
  tensors.push_back(std::move(bytes.qzeros));
  tensors.push_back(std::move(bytes.scales));
  tensors.push_back(std::move(bytes.g_idx));
  return tensors;
}

template <GptqVersion kVersion>
Json config(const QuantScheme& scheme, std::span<const OutputModule> modules, const Json& meta) {
  std::vector<GptqModule> named;
  for (const OutputModule& module : modules) {
    named.push_back({module.name, module.scheme});
  }
  return gptq_config_json(scheme, kVersion, named, meta);
}

}  // namespace

std::span<const OutputFormat> output_formats() noexcept {
  // clang-format off
  static constexpr std::array<OutputFormat, 2> kFormats = {{
      {"gptq", "GPTQ v1, what most readers take", gptq_storage<GptqVersion::kV1>,
       check<GptqVersion::kV1>, gptq_declarations, pack<GptqVersion::kV1>, config<GptqVersion::kV1>},
      {"gptq_v2", "GPTQ v2, zero points as they are", gptq_storage<GptqVersion::kV2>,
       check<GptqVersion::kV2>, gptq_declarations, pack<GptqVersion::kV2>, config<GptqVersion::kV2>},
  }};
  // clang-format on
  return kFormats;
}

const OutputFormat& find_output_format(const std::string& name) {
  std::string known;
  for (const OutputFormat& format : output_formats()) {
    if (format.name == name) {
      return format;
    }
    known += (known.empty() ? "" : ", ") + std::string(format.name);
  }
  throw UnsupportedError(
      "unknown output format", "--format " + name, "expected one of " + known, "--format gptq");
}

}  // namespace quern
