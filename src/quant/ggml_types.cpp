// SPDX-License-Identifier: Apache-2.0
#include "quant/ggml_types.h"

#include "base/half.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace quern {
namespace {

constexpr int kSuper = 256;  // elements of the larger blocks
constexpr int kMaxGroups = 16;  // of a block

// clang-format off
constexpr std::array<GgmlTypeInfo, 34> kTypes = {{
    {GgmlType::kF32, "F32", 1, 4},           {GgmlType::kF16, "F16", 1, 2},
    {GgmlType::kQ40, "Q4_0", 32, 18},       {GgmlType::kQ41, "Q4_1", 32, 20},
    {GgmlType::kQ50, "Q5_0", 32, 22},       {GgmlType::kQ51, "Q5_1", 32, 24},
    {GgmlType::kQ80, "Q8_0", 32, 34},       {GgmlType::kQ81, "Q8_1", 32, 40},
    {GgmlType::kQ2K, "Q2_K", 256, 84},      {GgmlType::kQ3K, "Q3_K", 256, 110},
    {GgmlType::kQ4K, "Q4_K", 256, 144},     {GgmlType::kQ5K, "Q5_K", 256, 176},
    {GgmlType::kQ6K, "Q6_K", 256, 210},     {GgmlType::kQ8K, "Q8_K", 256, 292},
    {GgmlType::kIQ2XXS, "IQ2_XXS", 256, 66}, {GgmlType::kIQ2XS, "IQ2_XS", 256, 74},
    {GgmlType::kIQ3XXS, "IQ3_XXS", 256, 98}, {GgmlType::kIQ1S, "IQ1_S", 256, 50},
    {GgmlType::kIQ4NL, "IQ4_NL", 32, 18},   {GgmlType::kIQ3S, "IQ3_S", 256, 110},
    {GgmlType::kIQ2S, "IQ2_S", 256, 82},    {GgmlType::kIQ4XS, "IQ4_XS", 256, 136},
    {GgmlType::kI8, "I8", 1, 1},             {GgmlType::kI16, "I16", 1, 2},
    {GgmlType::kI32, "I32", 1, 4},           {GgmlType::kI64, "I64", 1, 8},
    {GgmlType::kF64, "F64", 1, 8},           {GgmlType::kIQ1M, "IQ1_M", 256, 56},
    {GgmlType::kBF16, "BF16", 1, 2},         {GgmlType::kTQ10, "TQ1_0", 256, 54},
    {GgmlType::kTQ20, "TQ2_0", 256, 66},    {GgmlType::kMXFP4, "MXFP4", 32, 17},
    {GgmlType::kNVFP4, "NVFP4", 64, 36},     {GgmlType::kQ10, "Q1_0", 128, 18},
}};
// clang-format on

template <std::size_t kCount>
constexpr std::array<float, kCount> values_from(int first) {
  std::array<float, kCount> values{};
  for (std::size_t i = 0; i < kCount; ++i) {
    values[i] = static_cast<float>(first + static_cast<int>(i));
  }
  return values;
}

constexpr auto kTwoBits = values_from<4>(0);
constexpr auto kThreeBits = values_from<8>(-4);
constexpr auto kFourBits = values_from<16>(0);
constexpr auto kFourBitsSigned = values_from<16>(-8);
constexpr auto kFiveBits = values_from<32>(0);
constexpr auto kFiveBitsSigned = values_from<32>(-16);
constexpr auto kSixBits = values_from<64>(-32);
constexpr auto kEightBits = values_from<256>(-128);
// kvalues_iq4nl of ggml/src/ggml-common.h.
constexpr std::array<float, 16> kNonLinear = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// kvalues_fp4: twice the values of E2M1.
constexpr std::array<float, 16> kFp4 = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The stored scales of one block.
struct Scales {
  std::uint16_t d = 0;
  std::uint16_t dmin = 0;
  std::array<std::int8_t, kMaxGroups> scale{};
  std::array<std::int8_t, kMaxGroups> minimum{};
};

using Bytes = const std::uint8_t*;
using Out = std::uint8_t*;

std::uint16_t load16(Bytes bytes) {
  return static_cast<std::uint16_t>(bytes[0] | (bytes[1] << 8U));
}

void store16(Out bytes, std::uint32_t value) {
  bytes[0] = static_cast<std::uint8_t>(value);
  bytes[1] = static_cast<std::uint8_t>(value >> 8U);
}

std::uint8_t byte_of(unsigned value) {
  return static_cast<std::uint8_t>(value);
}

std::int8_t small(int value) {
  return static_cast<std::int8_t>(value);
}

// `half` bytes: the low nibbles are the first `half` codes, the high ones the next.
void read_nibbles(Bytes bytes, int half, Out codes) {
  for (int i = 0; i < half; ++i) {
    codes[i] = bytes[i] & 15U;
    codes[half + i] = bytes[i] >> 4U;
  }
}

void write_nibbles(Bytes codes, int half, Out bytes) {
  for (int i = 0; i < half; ++i) {
    bytes[i] = byte_of((codes[i] & 15U) | (unsigned{codes[half + i]} << 4U));
  }
}

void read_chunks(Bytes bytes, int half, Out codes) {
  for (int at = 0; at < kSuper; at += 2 * half) {
    read_nibbles(bytes + at / 2, half, codes + at);
  }
}

void write_chunks(Bytes codes, int half, Out bytes) {
  for (int at = 0; at < kSuper; at += 2 * half) {
    write_nibbles(codes + at, half, bytes + at / 2);
  }
}

// Q5_0 and Q5_1: bit i of 32 is the fifth bit of code i.
void read_fifth_bits(Bytes bits, Out codes) {
  for (int byte = 0; byte < 4; ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      codes[8 * byte + bit] |= byte_of(((bits[byte] >> bit) & 1U) << 4U);
    }
  }
}

void write_fifth_bits(Bytes codes, Out bits) {
  std::memset(bits, 0, 4);
  for (int i = 0; i < 32; ++i) {
    bits[i / 8] |= byte_of(((unsigned{codes[i]} >> 4U) & 1U) << (i % 8));
  }
}

// The loops over runs of 32 codes are what compilers turn into vector instructions.
constexpr int kRun = 32;

// Q3_K and Q5_K: bit j of byte l is bit `bit` of code 32 j + l.
void read_high_bits(Bytes bits, int bit, Out codes) {
  for (int j = 0; j < kSuper / kRun; ++j) {
    for (int l = 0; l < kRun; ++l) {
      codes[kRun * j + l] |= byte_of(((bits[l] >> j) & 1U) << bit);
    }
  }
}

void write_high_bits(Bytes codes, int bit, Out bits) {
  std::memset(bits, 0, kRun);
  for (int j = 0; j < kSuper / kRun; ++j) {
    for (int l = 0; l < kRun; ++l) {
      bits[l] |= byte_of(((unsigned{codes[kRun * j + l]} >> bit) & 1U) << j);
    }
  }
}

// Q2_K and Q3_K: code 128 h + 32 s + l is at bit 2 s of byte 32 h + l.
void read_pairs(Bytes bytes, Out codes) {
  for (int j = 0; j < kSuper / kRun; ++j) {
    Bytes from = bytes + j / 4 * kRun;
    for (int l = 0; l < kRun; ++l) {
      codes[kRun * j + l] = (from[l] >> (j % 4 * 2)) & 3U;
    }
  }
}

void write_pairs(Bytes codes, Out bytes) {
  std::memset(bytes, 0, 2 * kRun);
  for (int j = 0; j < kSuper / kRun; ++j) {
    Out to = bytes + j / 4 * kRun;
    for (int l = 0; l < kRun; ++l) {
      to[l] |= byte_of((codes[kRun * j + l] & 3U) << (j % 4 * 2));
    }
  }
}

// A block whose scale (and minimum) are its first halves, for its only group.
void read_single(Bytes block, Scales& scales) {
  scales.d = load16(block);
  scales.scale[0] = 1;
}

void write_single(const Scales& scales, Out block) {
  store16(block, scales.d);
}

void read_single_with_minimum(Bytes block, Scales& scales) {
  read_single(block, scales);
  scales.dmin = load16(block + 2);
  scales.minimum[0] = -1;
}

void write_single_with_minimum(const Scales& scales, Out block) {
  write_single(scales, block);
  store16(block + 2, scales.dmin);
}

// Q4_0 and IQ4_NL: d, 16 bytes of nibbles.
void read_codes_4(Bytes block, Out codes) {
  read_nibbles(block + 2, 16, codes);
}
void write_codes_4(Bytes codes, Out block) {
  write_nibbles(codes, 16, block + 2);
}

// Q4_1: d, m, nibbles.
void read_codes_4m(Bytes block, Out codes) {
  read_nibbles(block + 4, 16, codes);
}
void write_codes_4m(Bytes codes, Out block) {
  write_nibbles(codes, 16, block + 4);
}

// Q5_0: d, 4 bytes of fifth bits, nibbles.
void read_codes_5(Bytes block, Out codes) {
  read_nibbles(block + 6, 16, codes);
  read_fifth_bits(block + 2, codes);
}
void write_codes_5(Bytes codes, Out block) {
  write_nibbles(codes, 16, block + 6);
  write_fifth_bits(codes, block + 2);
}

// Q5_1: d, m, 4 bytes of fifth bits, nibbles.
void read_codes_5m(Bytes block, Out codes) {
  read_nibbles(block + 8, 16, codes);
  read_fifth_bits(block + 4, codes);
}
void write_codes_5m(Bytes codes, Out block) {
  write_nibbles(codes, 16, block + 8);
  write_fifth_bits(codes, block + 4);
}

// Q8_0: d, 32 signed bytes.
void read_codes_8(Bytes block, Out codes) {
  for (int i = 0; i < 32; ++i) {
    codes[i] = block[2 + i] ^ 0x80U;
  }
}
void write_codes_8(Bytes codes, Out block) {
  for (int i = 0; i < 32; ++i) {
    block[2 + i] = codes[i] ^ 0x80U;
  }
}

// Q2_K: 16 bytes (scale low, minimum high), 64 bytes of codes, d, dmin.
void read_codes_2k(Bytes block, Out codes) {
  read_pairs(block + 16, codes);
}
void write_codes_2k(Bytes codes, Out block) {
  write_pairs(codes, block + 16);
}
void read_scales_2k(Bytes block, Scales& scales) {
  for (std::size_t j = 0; j < 16; ++j) {
    scales.scale[j] = small(block[j] & 15);
    scales.minimum[j] = small(block[j] >> 4U);
  }
  scales.d = load16(block + 80);
  scales.dmin = load16(block + 82);
}
void write_scales_2k(const Scales& scales, Out block) {
  for (std::size_t j = 0; j < 16; ++j) {
    block[j] = byte_of(static_cast<unsigned>(scales.scale[j] | (scales.minimum[j] << 4U)));
  }
  store16(block + 80, scales.d);
  store16(block + 82, scales.dmin);
}

// Q3_K: 32 bytes of third bits, 64 bytes of low bits, 12 bytes of scales, d.
void read_codes_3k(Bytes block, Out codes) {
  read_pairs(block + 32, codes);
  read_high_bits(block, 2, codes);
}
void write_codes_3k(Bytes codes, Out block) {
  write_pairs(codes, block + 32);
  write_high_bits(codes, 2, block);
}
// Scale j + 32: low nibble in byte j % 8, two high bits in byte 8 + j % 4.
void read_scales_3k(Bytes block, Scales& scales) {
  Bytes packed = block + 96;
  for (unsigned j = 0; j < 16; ++j) {
    const unsigned low = (packed[j % 8] >> (j / 8 * 4)) & 15U;
    const unsigned high = (packed[8 + j % 4] >> (j / 4 * 2)) & 3U;
    scales.scale[j] = small(static_cast<int>(low | (high << 4U)) - 32);
  }
  scales.d = load16(block + 108);
}
void write_scales_3k(const Scales& scales, Out block) {
  Out packed = block + 96;
  std::memset(packed, 0, 12);
  for (unsigned j = 0; j < 16; ++j) {
    const auto value = static_cast<unsigned>(scales.scale[j] + 32);
    packed[j % 8] |= byte_of((value & 15U) << (j / 8 * 4));
    packed[8 + j % 4] |= byte_of((value >> 4U) << (j / 4 * 2));
  }
  store16(block + 108, scales.d);
}

// Q4_K and Q5_K: d, dmin, then 12 bytes with eight scales and eight minimums of 6 bits. Those of
// groups 0-3 are the low six bits of bytes j and j + 4; of groups 4-7 the low nibbles are the
// nibbles of byte j + 4, and the two high bits the free ones of bytes j - 4 and j.
void read_scales_4k(Bytes block, Scales& scales) {
  scales.d = load16(block);
  scales.dmin = load16(block + 2);
  Bytes packed = block + 4;
  for (unsigned j = 0; j < 4; ++j) {
    scales.scale[j] = small(packed[j] & 63);
    scales.minimum[j] = small(packed[j + 4] & 63);
    scales.scale[j + 4] = small((packed[j + 8] & 15) | ((packed[j] >> 6U) << 4U));
    scales.minimum[j + 4] = small((packed[j + 8] >> 4U) | ((packed[j + 4] >> 6U) << 4U));
  }
}
void write_scales_4k(const Scales& scales, Out block) {
  store16(block, scales.d);
  store16(block + 2, scales.dmin);
  Out packed = block + 4;
  for (unsigned j = 0; j < 4; ++j) {
    const auto high_scale = static_cast<unsigned>(scales.scale[j + 4]);
    const auto high_minimum = static_cast<unsigned>(scales.minimum[j + 4]);
    packed[j] = byte_of(static_cast<unsigned>(scales.scale[j]) | ((high_scale >> 4U) << 6U));
    packed[j + 4] =
        byte_of(static_cast<unsigned>(scales.minimum[j]) | ((high_minimum >> 4U) << 6U));
    packed[j + 8] = byte_of((high_scale & 15U) | ((high_minimum & 15U) << 4U));
  }
}

// Q4_K: codes in chunks of 64, first half in the low nibbles.
void read_codes_4k(Bytes block, Out codes) {
  read_chunks(block + 16, 32, codes);
}
void write_codes_4k(Bytes codes, Out block) {
  write_chunks(codes, 32, block + 16);
}

// Q5_K: 32 bytes of fifth bits before the nibbles.
void read_codes_5k(Bytes block, Out codes) {
  read_chunks(block + 48, 32, codes);
  read_high_bits(block + 16, 4, codes);
}
void write_codes_5k(Bytes codes, Out block) {
  write_chunks(codes, 32, block + 48);
  write_high_bits(codes, 4, block + 16);
}

// Q6_K: 128 bytes of nibbles, 64 bytes of high pairs, 16 signed scales, d. Half h of the block is
// a chunk of 64 nibble bytes; its code 32 s + l has the pair at bit 2 s of byte 32 h + l.
void read_codes_6k(Bytes block, Out codes) {
  read_chunks(block, 64, codes);
  std::array<std::uint8_t, kSuper> high{};
  read_pairs(block + 128, high.data());
  for (std::size_t i = 0; i < kSuper; ++i) {
    codes[i] |= byte_of(unsigned{high[i]} << 4U);
  }
}
void write_codes_6k(Bytes codes, Out block) {
  write_chunks(codes, 64, block);
  std::array<std::uint8_t, kSuper> high{};
  for (std::size_t i = 0; i < kSuper; ++i) {
    high[i] = codes[i] >> 4U;
  }
  write_pairs(high.data(), block + 128);
}
void read_scales_6k(Bytes block, Scales& scales) {
  std::memcpy(scales.scale.data(), block + 192, 16);
  scales.d = load16(block + 208);
}
void write_scales_6k(const Scales& scales, Out block) {
  std::memcpy(block + 192, scales.scale.data(), 16);
  store16(block + 208, scales.d);
}

// IQ4_XS: d, 16 bits with the two high bits of each scale + 32, 4 bytes with the low nibbles, codes
// in chunks of 32.
void read_codes_4xs(Bytes block, Out codes) {
  read_chunks(block + 8, 16, codes);
}
void write_codes_4xs(Bytes codes, Out block) {
  write_chunks(codes, 16, block + 8);
}
void read_scales_4xs(Bytes block, Scales& scales) {
  scales.d = load16(block);
  const unsigned high = load16(block + 2);
  for (unsigned j = 0; j < 8; ++j) {
    const unsigned low = (block[4 + j / 2] >> (j % 2 * 4)) & 15U;
    scales.scale[j] = small(static_cast<int>(low | (((high >> (2 * j)) & 3U) << 4U)) - 32);
  }
}
void write_scales_4xs(const Scales& scales, Out block) {
  store16(block, scales.d);
  unsigned high = 0;
  std::memset(block + 4, 0, 4);
  for (unsigned j = 0; j < 8; ++j) {
    const auto value = static_cast<unsigned>(scales.scale[j] + 32);
    block[4 + j / 2] |= byte_of((value & 15U) << (j % 2 * 4));
    high |= (value >> 4U) << (2 * j);
  }
  store16(block + 2, high);
}

struct Codec {
  GgmlLayout layout;
  void (*read_codes)(Bytes block, Out codes);
  void (*write_codes)(Bytes codes, Out block);
  void (*read_scales)(Bytes block, Scales& scales);
  void (*write_scales)(const Scales& scales, Out block);
};

// clang-format off
constexpr std::array<Codec, 12> kCodecs = {{
    {{GgmlType::kQ40, 32, 32, kFourBitsSigned}, read_codes_4, write_codes_4, read_single, write_single},
    {{GgmlType::kQ41, 32, 32, kFourBits, true, 0, 1, 1, -1, -1}, read_codes_4m, write_codes_4m, read_single_with_minimum, write_single_with_minimum},
    {{GgmlType::kQ50, 32, 32, kFiveBitsSigned}, read_codes_5, write_codes_5, read_single, write_single},
    {{GgmlType::kQ51, 32, 32, kFiveBits, true, 0, 1, 1, -1, -1}, read_codes_5m, write_codes_5m, read_single_with_minimum, write_single_with_minimum},
    {{GgmlType::kQ80, 32, 32, kEightBits, true, 1}, read_codes_8, write_codes_8, read_single, write_single},
    {{GgmlType::kQ2K, 256, 16, kTwoBits, true, 0, 0, 15, 0, 15}, read_codes_2k, write_codes_2k, read_scales_2k, write_scales_2k},
    {{GgmlType::kQ3K, 256, 16, kThreeBits, true, 0, -32, 31}, read_codes_3k, write_codes_3k, read_scales_3k, write_scales_3k},
    {{GgmlType::kQ4K, 256, 32, kFourBits, true, 0, 0, 63, 0, 63}, read_codes_4k, write_codes_4k, read_scales_4k, write_scales_4k},
    {{GgmlType::kQ5K, 256, 32, kFiveBits, true, 0, 0, 63, 0, 63}, read_codes_5k, write_codes_5k, read_scales_4k, write_scales_4k},
    {{GgmlType::kQ6K, 256, 16, kSixBits, true, 0, -128, 127}, read_codes_6k, write_codes_6k, read_scales_6k, write_scales_6k},
    {{GgmlType::kIQ4NL, 32, 32, kNonLinear, false}, read_codes_4, write_codes_4, read_single, write_single},
    {{GgmlType::kIQ4XS, 256, 32, kNonLinear, false, 0, -32, 31}, read_codes_4xs, write_codes_4xs, read_scales_4xs, write_scales_4xs},
}};
// clang-format on

const Codec* find_codec(GgmlType type) noexcept {
  const auto found = std::find_if(kCodecs.begin(), kCodecs.end(), [&](const Codec& codec) {
    return codec.layout.type == type;
  });
  return found == kCodecs.end() ? nullptr : &*found;
}

const Codec& codec_of(GgmlType type) {
  const Codec* codec = find_codec(type);
  if (codec == nullptr) {
    throw std::logic_error(fmt::format("{} rows cannot be taken apart", ggml_type_info(type).name));
  }
  return *codec;
}

void check_sizes(GgmlType type, std::size_t bytes, std::size_t elements) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  const auto block = static_cast<std::size_t>(info.block);
  if (elements % block != 0 || bytes != elements / block * static_cast<std::size_t>(info.bytes)) {
    throw std::logic_error(
        fmt::format("a {} row of {} elements is not {} bytes", info.name, elements, bytes));
  }
}

Bytes data_of(std::span<const std::byte> bytes) {
  return reinterpret_cast<Bytes>(bytes.data());
}

void dequantize_block(const Codec& codec, Bytes block, float* out) {
  const GgmlLayout& layout = codec.layout;
  std::array<std::uint8_t, kSuper> codes{};
  Scales scales;
  codec.read_codes(block, codes.data());
  codec.read_scales(block, scales);
  const float d = f16_to_float(scales.d);
  const float dmin = f16_to_float(scales.dmin);
  const int first = static_cast<int>(layout.values[0]);
  for (int g = 0; g < layout.groups(); ++g) {
    const auto j = static_cast<std::size_t>(g);
    const float scale = d * static_cast<float>(scales.scale[j]);
    const float minimum =
        layout.has_minimum() ? dmin * static_cast<float>(scales.minimum[j]) : 0.0F;
    const std::uint8_t* code = codes.data() + g * layout.group;
    float* values = out + g * layout.group;
    if (layout.linear) {
      for (int i = 0; i < layout.group; ++i) {
        values[i] = scale * static_cast<float>(code[i] + first) - minimum;
      }
    } else {
      for (int i = 0; i < layout.group; ++i) {
        values[i] = scale * layout.values[code[i]] - minimum;
      }
    }
  }
}

// E8M0: one byte e, the scale is 2^(e - 128) for the doubled values.
void dequantize_mxfp4(Bytes block, float* out) {
  const std::uint32_t e = block[0];
  const float scale = std::bit_cast<float>(e < 2 ? 0x00200000U << e : (e - 1) << 23U);
  std::array<std::uint8_t, 32> codes{};
  read_nibbles(block + 1, 16, codes.data());
  for (std::size_t i = 0; i < codes.size(); ++i) {
    out[i] = scale * kFp4[codes[i]];
  }
}

void dequantize_floats(GgmlType type, Bytes row, std::span<float> out) {
  if (type == GgmlType::kF32) {
    std::memcpy(out.data(), row, out.size_bytes());
    return;
  }
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::uint16_t bits = load16(row + 2 * i);
    out[i] = type == GgmlType::kF16 ? f16_to_float(bits) : bf16_to_float(bits);
  }
}

bool is_float(GgmlType type) {
  return type == GgmlType::kF32 || type == GgmlType::kF16 || type == GgmlType::kBF16;
}

}  // namespace

const GgmlTypeInfo* find_ggml_type(std::uint32_t number) noexcept {
  const auto found = std::find_if(kTypes.begin(), kTypes.end(), [&](const GgmlTypeInfo& info) {
    return static_cast<std::uint32_t>(info.type) == number;
  });
  return found == kTypes.end() ? nullptr : &*found;
}

const GgmlTypeInfo& ggml_type_info(GgmlType type) noexcept {
  return *find_ggml_type(static_cast<std::uint32_t>(type));
}

std::optional<GgmlType> ggml_type_from_name(std::string_view name) noexcept {
  const auto found = std::find_if(
      kTypes.begin(), kTypes.end(), [&](const GgmlTypeInfo& info) { return info.name == name; });
  return found == kTypes.end() ? std::nullopt : std::optional(found->type);
}

bool can_dequantize(GgmlType type) noexcept {
  return is_float(type) || type == GgmlType::kMXFP4 || find_codec(type) != nullptr;
}

void dequantize_row(GgmlType type, std::span<const std::byte> row, std::span<float> out) {
  check_sizes(type, row.size(), out.size());
  if (is_float(type)) {
    dequantize_floats(type, data_of(row), out);
    return;
  }
  const Codec* codec = type == GgmlType::kMXFP4 ? nullptr : &codec_of(type);
  const GgmlTypeInfo& info = ggml_type_info(type);
  Bytes block = data_of(row);
  for (std::size_t at = 0; at < out.size(); at += static_cast<std::size_t>(info.block)) {
    if (codec == nullptr) {
      dequantize_mxfp4(block, out.data() + at);
    } else {
      dequantize_block(*codec, block, out.data() + at);
    }
    block += info.bytes;
  }
}

const GgmlLayout* ggml_layout(GgmlType type) noexcept {
  const Codec* codec = find_codec(type);
  return codec == nullptr ? nullptr : &codec->layout;
}

GgmlRow GgmlRow::make(const GgmlLayout& layout, std::size_t n) {
  const auto block = static_cast<std::size_t>(layout.block);
  if (n % block != 0) {
    throw std::logic_error(fmt::format("{} elements are no whole blocks of {}", n, block));
  }
  const std::size_t groups = n / static_cast<std::size_t>(layout.group);
  GgmlRow row;
  row.codes.resize(n);
  row.d.resize(n / block);
  row.dmin.resize(layout.has_minimum() ? n / block : 0);
  row.sub_scale.assign(groups, small(layout.has_sub_scales() ? 0 : layout.scale_low));
  row.sub_minimum.assign(groups, small(std::min(layout.minimum_low, 0)));
  row.scale.resize(groups);
  row.minimum.resize(groups);
  return row;
}

void GgmlRow::apply_scales(const GgmlLayout& layout, std::size_t b) noexcept {
  const float super = f16_to_float(d[b]);
  const float super_minimum = dmin.empty() ? 0.0F : f16_to_float(dmin[b]);
  const auto groups = static_cast<std::size_t>(layout.groups());
  for (std::size_t g = b * groups; g < (b + 1) * groups; ++g) {
    scale[g] = super * static_cast<float>(sub_scale[g]);
    minimum[g] = super_minimum * static_cast<float>(sub_minimum[g]);
  }
}

GgmlRow unpack_row(GgmlType type, std::span<const std::byte> bytes) {
  const Codec& codec = codec_of(type);
  const GgmlLayout& layout = codec.layout;
  const auto block_bytes = static_cast<std::size_t>(ggml_type_info(type).bytes);
  const std::size_t blocks = bytes.size() / block_bytes;
  const auto elements = static_cast<std::size_t>(layout.block);
  check_sizes(type, bytes.size(), blocks * elements);
  GgmlRow row = GgmlRow::make(layout, blocks * elements);
  const auto groups = static_cast<std::size_t>(layout.groups());
  for (std::size_t b = 0; b < blocks; ++b) {
    Bytes block = data_of(bytes) + b * block_bytes;
    Scales scales;
    codec.read_codes(block, row.codes.data() + b * elements);
    codec.read_scales(block, scales);
    row.d[b] = scales.d;
    if (layout.has_minimum()) {
      row.dmin[b] = scales.dmin;
    }
    std::copy_n(scales.scale.begin(), groups, row.sub_scale.data() + b * groups);
    std::copy_n(scales.minimum.begin(), groups, row.sub_minimum.data() + b * groups);
    row.apply_scales(layout, b);
  }
  return row;
}

void pack_row(GgmlType type, const GgmlRow& row, std::span<std::byte> bytes) {
  const Codec& codec = codec_of(type);
  const GgmlLayout& layout = codec.layout;
  check_sizes(type, bytes.size(), row.codes.size());
  const auto block_bytes = static_cast<std::size_t>(ggml_type_info(type).bytes);
  const auto elements = static_cast<std::size_t>(layout.block);
  const auto groups = static_cast<std::size_t>(layout.groups());
  for (std::size_t b = 0; b < row.d.size(); ++b) {
    Out block = reinterpret_cast<Out>(bytes.data()) + b * block_bytes;
    Scales scales;
    scales.d = row.d[b];
    scales.dmin = layout.has_minimum() ? row.dmin[b] : std::uint16_t{0};
    std::copy_n(row.sub_scale.data() + b * groups, groups, scales.scale.begin());
    std::copy_n(row.sub_minimum.data() + b * groups, groups, scales.minimum.begin());
    codec.write_codes(row.codes.data() + b * elements, block);
    codec.write_scales(scales, block);
  }
}

}  // namespace quern
