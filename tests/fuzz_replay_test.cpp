// SPDX-License-Identifier: Apache-2.0
// The fuzz targets on their seed corpora, so that every compiler and sanitizer sees them.
#include <gtest/gtest.h>

#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "../fuzz/safetensors_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_gptq_config
#include "../fuzz/gptq_config_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_gptq_tensors
#include "../fuzz/gptq_tensors_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_awq_tensors
#include "../fuzz/awq_tensors_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_compressed_tensors
#include "../fuzz/compressed_tensors_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_compressed_config
#include "../fuzz/compressed_config_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_json_config
#include "../fuzz/json_config_fuzz.cpp"
#undef LLVMFuzzerTestOneInput

#define LLVMFuzzerTestOneInput fuzz_gguf
#include "../fuzz/gguf_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_imatrix
#include "../fuzz/imatrix_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_image
#include "../fuzz/image_fuzz.cpp"
#undef LLVMFuzzerTestOneInput

#include "base/file.h"

#include <filesystem>
#include <string>

namespace quern {
namespace {

using FuzzTarget = int(const std::uint8_t* data, std::size_t size);

void replay(const std::string& name, FuzzTarget* target) {
  const std::filesystem::path corpus =
      std::filesystem::path(QUERN_TESTDATA) / ".." / "fuzz" / "corpus" / name;
  std::size_t inputs = 0;
  for (const auto& entry : std::filesystem::directory_iterator(corpus)) {
    const std::string bytes = read_file(entry.path());
    EXPECT_EQ(target(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()), 0);
    ++inputs;
  }
  EXPECT_GT(inputs, 0U);
}

TEST(FuzzReplay, Safetensors) {
  replay("safetensors", fuzz_safetensors);
}
TEST(FuzzReplay, GptqConfig) {
  replay("gptq_config", fuzz_gptq_config);
}
TEST(FuzzReplay, GptqTensors) {
  replay("gptq_tensors", fuzz_gptq_tensors);
}
TEST(FuzzReplay, Gguf) {
  replay("gguf", fuzz_gguf);
}
TEST(FuzzReplay, Imatrix) {
  replay("imatrix", fuzz_imatrix);
}
TEST(FuzzReplay, Image) {
  replay("image", fuzz_image);
}
TEST(FuzzReplay, AwqTensors) {
  replay("awq_tensors", fuzz_awq_tensors);
}
TEST(FuzzReplay, CompressedTensors) {
  replay("compressed_tensors", fuzz_compressed_tensors);
}
TEST(FuzzReplay, CompressedConfig) {
  replay("compressed_config", fuzz_compressed_config);
}
TEST(FuzzReplay, JsonConfig) {
  replay("json_config", fuzz_json_config);
}

}  // namespace
}  // namespace quern
