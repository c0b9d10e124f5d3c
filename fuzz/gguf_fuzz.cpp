// SPDX-License-Identifier: Apache-2.0
// The GGUF parser on arbitrary bytes: either quern::Error, or tensors that lie inside of the input
// and have the size of their type, rows that are packed again to the same bytes, and metadata that
// is written and read again. A tokenizer in the metadata is built or refused.
#include "base/error.h"
#include "format/gguf_file.h"
#include "format/gguf_tokenizer.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

namespace {

void check_tensor(const quern::GgufTensor& tensor, std::span<const std::byte> file) {
  const bool inside = tensor.bytes.empty() ||
                      (tensor.bytes.data() >= file.data() &&
                       tensor.bytes.data() + tensor.bytes.size() <= file.data() + file.size());
  if (!inside || quern::ggml_tensor_bytes(tensor.type, tensor.shape) != tensor.bytes.size()) {
    std::abort();
  }
  const auto block = static_cast<std::size_t>(quern::ggml_type_info(tensor.type).block);
  const auto block_bytes = static_cast<std::size_t>(quern::ggml_type_info(tensor.type).bytes);
  std::vector<float> values(tensor.bytes.size() / block_bytes * block);
  if (quern::can_dequantize(tensor.type)) {
    quern::dequantize_row(tensor.type, tensor.bytes, values);
  }
  if (quern::ggml_layout(tensor.type) != nullptr) {
    std::vector<std::byte> again(tensor.bytes.size());
    quern::pack_row(tensor.type, quern::unpack_row(tensor.type, tensor.bytes), again);
    if (!std::equal(again.begin(), again.end(), tensor.bytes.begin())) {
      std::abort();
    }
  }
}

void check_writing(const quern::GgufContent& content) {
  const std::string header = quern::plan_gguf(content.metadata, {}).header;
  const auto bytes = std::as_bytes(std::span(header.data(), header.size()));
  const quern::GgufContent again = quern::parse_gguf(bytes, "again");
  if (quern::plan_gguf(again.metadata, {}).header != header) {
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    const quern::GgufContent content = quern::parse_gguf(file, "input");
    for (const quern::GgufTensor& tensor : content.tensors) {
      check_tensor(tensor, file);
    }
    check_writing(content);
    (void)quern::tokenizer_from_gguf(content.metadata);
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
