// SPDX-License-Identifier: Apache-2.0
#include "format/awq.h"

#include "base/error.h"
#include "format/packing.h"
#include "quern/version.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace quern {
namespace {

constexpr int kBits = 4;
constexpr std::int64_t kPerWord = 8;
// Where output 8c + t stands in a word: AutoAWQ's AWQ_PACK_ORDER, inverted.
constexpr std::array<int, kPerWord> kNibble = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr std::int64_t kMaxGroupSize = 1 << 20;

// Words of a matrix [rows, columns] that is stored with any alignment.
class WordMatrix {
 public:
  WordMatrix(std::span<const std::byte> bytes, std::int64_t columns)
      : bytes_(bytes), columns_(columns) {}
  [[nodiscard]] std::uint32_t at(std::int64_t row, std::int64_t column) const {
    std::uint32_t word = 0;
    std::memcpy(&word, bytes_.data() + (row * columns_ + column) * 4, 4);
    return word;
  }

 private:
  std::span<const std::byte> bytes_;
  std::int64_t columns_;
};

std::uint32_t nibble(std::uint32_t word, int place) {
  return (word >> (kBits * place)) & 0xFU;
}

// Calls visit(first input, word of outputs) for all blocks of 8 inputs by 8 outputs, in tiles that
// read and write whole cache lines.
template <class Visit>
void for_blocks(std::int64_t in, std::int64_t words, Visit visit) {
  constexpr std::int64_t kTile = 128;
  for (std::int64_t tile = 0; tile < in; tile += kTile) {
    for (std::int64_t c = 0; c < words; ++c) {
      for (std::int64_t i = tile; i < std::min(in, tile + kTile); i += kPerWord) {
        visit(i, c);
      }
    }
  }
}

bool fits(const QuantScheme& scheme, std::int64_t out, std::int64_t in) {
  return out > 0 && in > 0 && out % kPerWord == 0 && in % scheme.group_width(in) == 0;
}

void read_codes(const TensorView& qweight, PackedLinear& packed) {
  const std::int64_t in = packed.in_features;
  const std::int64_t words = packed.out_features / kPerWord;
  const WordMatrix stored(qweight.bytes, words);
  for_blocks(in, words, [&](std::int64_t i, std::int64_t c) {
    std::array<std::uint32_t, kPerWord> rows{};  // of 8 outputs
    for (std::int64_t k = 0; k < std::min(kPerWord, in - i); ++k) {
      const std::uint32_t word = stored.at(i + k, c);
      for (std::size_t t = 0; t < rows.size(); ++t) {
        rows[t] |= nibble(word, kNibble[t]) << (kBits * k);
      }
    }
    for (std::int64_t t = 0; t < kPerWord; ++t) {
      packed.codes[static_cast<std::size_t>((c * kPerWord + t) * packed.row_words + i / kPerWord)] =
          rows[static_cast<std::size_t>(t)];
    }
  });
}

std::vector<std::uint32_t> write_codes(const PackedLinear& packed) {
  const std::int64_t in = packed.in_features;
  const std::int64_t words = packed.out_features / kPerWord;
  std::vector<std::uint32_t> stored(static_cast<std::size_t>(in * words));
  for_blocks(in, words, [&](std::int64_t i, std::int64_t c) {
    for (std::int64_t t = 0; t < kPerWord; ++t) {
      const std::uint32_t row = packed.codes[static_cast<std::size_t>(
          (c * kPerWord + t) * packed.row_words + i / kPerWord)];
      for (std::int64_t k = 0; k < std::min(kPerWord, in - i); ++k) {
        stored[static_cast<std::size_t>((i + k) * words + c)] |=
            nibble(row, static_cast<int>(k)) << (kBits * kNibble[static_cast<std::size_t>(t)]);
      }
    }
  });
  return stored;
}

std::vector<std::uint8_t> read_zeros(const TensorView& qzeros, std::int64_t out) {
  const std::int64_t groups = qzeros.shape[0];
  const std::int64_t words = qzeros.shape[1];
  const WordMatrix stored(qzeros.bytes, words);
  std::vector<std::uint8_t> zeros(static_cast<std::size_t>(out * groups));
  for (std::int64_t group = 0; group < groups; ++group) {
    for (std::int64_t o = 0; o < out; ++o) {
      zeros[static_cast<std::size_t>(o * groups + group)] = static_cast<std::uint8_t>(
          nibble(stored.at(group, o / kPerWord), kNibble[static_cast<std::size_t>(o % kPerWord)]));
    }
  }
  return zeros;
}

std::vector<std::uint32_t> write_zeros(const PackedLinear& packed) {
  const std::int64_t groups = packed.groups();
  const std::int64_t words = packed.out_features / kPerWord;
  std::vector<std::uint32_t> stored(static_cast<std::size_t>(groups * words));
  for (std::int64_t group = 0; group < groups; ++group) {
    for (std::int64_t o = 0; o < packed.out_features; ++o) {
      stored[static_cast<std::size_t>(group * words + o / kPerWord)] |=
          static_cast<std::uint32_t>(packed.zero(o, group))
          << (kBits * kNibble[static_cast<std::size_t>(o % kPerWord)]);
    }
  }
  return stored;
}

template <class T>
T first_named(const JsonReader& reader, const char* name, const char* alias, T fallback) {
  const bool has_name = reader.has(name);
  if (has_name && reader.has(alias) && reader.json().at(name) != reader.json().at(alias)) {
    throw ParseError(
        "the quantization configuration contradicts itself",
        reader.place(alias),
        fmt::format("expected the same as in {}", name),
        "correct the configuration, or download the model again");
  }
  const char* key = has_name ? name : alias;
  if constexpr (std::is_same_v<T, std::string>) {
    return reader.get_string_or(key, fallback);
  } else {
    return reader.has(key) ? reader.get_int_in(key, -1, kMaxGroupSize) : fallback;
  }
}

void require_gemm(const JsonReader& reader) {
  std::string version = first_named<std::string>(reader, "version", "format", "gemm");
  std::transform(version.begin(), version.end(), version.begin(), [](unsigned char c) {
    return static_cast<char>(c >= 'A' && c <= 'Z' ? c + 'a' - 'A' : c);
  });
  if (version != "gemm") {
    throw UnsupportedError(
        "an AWQ version that quern does not read",
        reader.place("version"),
        "expected gemm, found " + printable(version, 40),
        "convert the checkpoint with AutoAWQ to the gemm version");
  }
}

}  // namespace

PackedLinear unpack_awq(
    const AwqTensors& tensors,
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where) {
  require_sizes(out_features, in_features, where);
  if (scheme.bits != kBits || !fits(scheme, out_features, in_features)) {
    throw ParseError(
        "a module does not have the sizes of AWQ",
        where,
        fmt::format(
            "expected 4 bits, outputs in multiples of {} and inputs in whole groups of {}, found "
            "{} bits, out {}, in {}",
            kPerWord,
            scheme.group_width(in_features),
            scheme.bits,
            out_features,
            in_features),
        "check that the quantization configuration belongs to these weights");
  }
  const std::int64_t groups = scheme.groups(in_features);
  const std::int64_t words = out_features / kPerWord;
  require_form(tensors.qweight, DType::kI32, {in_features, words}, extended(where, "qweight"));
  require_form(tensors.qzeros, DType::kI32, {groups, words}, extended(where, "qzeros"));
  PackedLinear packed;
  packed.scheme = scheme;
  packed.out_features = out_features;
  packed.in_features = in_features;
  packed.row_words = words_for(in_features, kBits);
  packed.scale_dtype = tensors.scales.dtype;
  packed.scales =
      read_transposed_scales(tensors.scales, groups, out_features, extended(where, "scales"));
  packed.zeros = read_zeros(tensors.qzeros, out_features);
  drop_middle_zeros(packed);
  packed.codes.resize(static_cast<std::size_t>(out_features * packed.row_words));
  read_codes(tensors.qweight, packed);
  return packed;
}

void check_awq_holds(
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where) {
  if (scheme.bits != kBits) {
    throw UnsupportedError(
        "AWQ does not hold this width",
        where,
        fmt::format("expected 4 bits, found {}", scheme.bits),
        "--bits 4, or --format compressed-tensors");
  }
  if (!fits(scheme, out_features, in_features)) {
    throw UnsupportedError(
        "AWQ cannot pack this matrix",
        where,
        fmt::format(
            "expected outputs in multiples of {} and inputs in whole groups of {}, found out {}, "
            "in {}",
            kPerWord,
            scheme.group_width(in_features),
            out_features,
            in_features),
        "another --group-size, or make a plan with quern plan and keep this linear");
  }
}

std::vector<TensorDeclaration> awq_declarations(
    const std::string& module,
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features) {
  const std::int64_t groups = scheme.groups(in_features);
  const std::int64_t words = out_features / kPerWord;
  return {
      {module + ".qweight", DType::kI32, {in_features, words}},
      {module + ".qzeros", DType::kI32, {groups, words}},
      {module + ".scales", DType::kF16, {groups, out_features}},
  };
}

AwqBytes pack_awq(const PackedLinear& packed, const std::string& where) {
  check_awq_holds(packed.scheme, packed.out_features, packed.in_features, where);
  require_natural_groups(packed, where);
  AwqBytes bytes;
  bytes.qweight = bytes_of(write_codes(packed));
  bytes.qzeros = bytes_of(write_zeros(packed));
  const std::vector<std::byte> halves = exact_scales(packed.scales, DType::kF16, where);
  bytes.scales.resize(halves.size());
  transpose<std::uint16_t>(
      halves.data(), packed.out_features, packed.groups(), bytes.scales.data());
  return bytes;
}

AwqConfig read_awq_config(const Json& json, const std::string& where) {
  const JsonReader reader(json, where);
  require_gemm(reader);
  const std::int64_t bits = first_named<std::int64_t>(reader, "bits", "w_bit", kBits);
  if (bits != kBits) {
    throw UnsupportedError(
        "AWQ does not hold this width",
        reader.place("bits"),
        fmt::format("expected 4 bits, found {}", bits),
        "use a 4-bit checkpoint");
  }
  const std::int64_t group_size =
      first_named<std::int64_t>(reader, "group_size", "q_group_size", 128);
  if (group_size == 0) {
    throw ParseError(
        "a key is out of range",
        reader.place("group_size"),
        "expected -1 or a positive number of columns, found 0",
        "check the file");
  }
  AwqConfig config;
  config.scheme.bits = kBits;
  config.scheme.group_size = std::max<std::int64_t>(0, group_size);
  config.scheme.symmetric = !reader.get_bool_or("zero_point", true);
  if (reader.has("modules_to_not_convert")) {
    for (const Json& entry : reader.get_array("modules_to_not_convert")) {
      if (!entry.is_string()) {
        throw ParseError(
            "an entry is no name",
            reader.place("modules_to_not_convert"),
            "expected a list of texts",
            "check the file");
      }
      config.unconverted.push_back(entry.get<std::string>());
    }
  }
  return config;
}

namespace {

// What of the name of a module in floats readers are to look for: names of theirs that hold all of
// a layer's experts, the vision tower and the draft layers as a whole.
std::string skipped_part(const std::string& module) {
  if (module.starts_with("mtp.")) {
    return "mtp.";
  }
  return module.starts_with("model.visual.")             ? "visual."
         : module.find(".experts.") != std::string::npos ? merged_name(module)
                                                         : module;
}

}  // namespace

Json awq_config_json(
    const QuantScheme& scheme, std::span<const SchemedModule> modules, const Json& meta) {
  (void)module_rules(modules);  // merged modules are quantized as a whole
  std::vector<std::string> unconverted;
  bool lm_head = false;
  for (const SchemedModule& module : modules) {
    if (!module.scheme) {
      const std::string part = skipped_part(module.name);
      if (std::find(unconverted.begin(), unconverted.end(), part) == unconverted.end()) {
        unconverted.push_back(part);
      }
      continue;
    }
    lm_head = lm_head || module.name == "lm_head";
    const QuantScheme& found = module.scheme->weights;
    if (found.bits != scheme.bits || found.group_size != scheme.group_size) {
      throw UnsupportedError(
          "AWQ has one scheme for all modules",
          module.name,
          fmt::format(
              "expected {} bits in groups of {}, found {} in {}",
              scheme.bits,
              scheme.group_size,
              found.bits,
              found.group_size),
          "--format compressed-tensors holds mixed schemes");
    }
  }
  for (const SchemedModule& module : modules) {
    for (const std::string& part : unconverted) {
      if (module.scheme && module.name.find(part) != std::string::npos) {
        throw UnsupportedError(
            "AWQ readers would take a quantized module for one in 16 bits",
            module.name,
            fmt::format("expected no module in 16 bits with a part of its name, found {}", part),
            "--format compressed-tensors");
      }
    }
  }
  if (!unconverted.empty() && !lm_head &&
      std::find(unconverted.begin(), unconverted.end(), "lm_head") == unconverted.end()) {
    unconverted.emplace_back("lm_head");  // a list replaces the readers' own default
  }
  Json json = {
      {"quant_method", "awq"},
      {"bits", scheme.bits},
      {"group_size", scheme.group_size == 0 ? -1 : scheme.group_size},
      {"zero_point", true},
      {"version", "gemm"},
      {"lm_head", lm_head},
      {"modules_to_not_convert", unconverted.empty() ? Json(nullptr) : Json(unconverted)}};
  json["meta"] = meta;
  json["meta"]["quantizer"] = Json::array({fmt::format("quern:{}", kVersion)});
  return json;
}

}  // namespace quern
