// SPDX-License-Identifier: Apache-2.0
// quantization_config of compressed-tensors and AWQ as arbitrary JSON, its targets on module names,
// and what is read written again.
#include "base/error.h"
#include "format/awq.h"
#include "format/compressed_tensors_config.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

namespace {

void read_and_write(const quern::Json& json) {
  const quern::CompressedConfig config = quern::read_compressed_config(json, "input");
  std::vector<quern::CompressedModule> modules;
  for (const char* name :
       {"model.layers.0.mlp.up_proj", "model.layers.31.self_attn.o_proj", "model.embed_tokens"}) {
    const quern::CompressedForm* form = config.form_for(name);
    modules.push_back({name, {}, std::string_view(name) != "model.embed_tokens"});
    if (form != nullptr && !form->per_tensor) {
      modules.back().form = *form;
    }
  }
  const quern::Json written = quern::compressed_config_json(modules);
  const quern::CompressedConfig again = quern::read_compressed_config(written, "written");
  for (const quern::CompressedModule& module : modules) {
    const quern::CompressedForm* form = again.form_for(module.name);
    if ((form != nullptr) != module.form.has_value() ||
        (form != nullptr && form->scheme != module.form->scheme)) {
      std::abort();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const bool awq : {false, true}) {
    try {
      const quern::Json json = quern::parse_json(text, "input");
      if (awq) {
        (void)quern::read_awq_config(json, "input");
      } else {
        read_and_write(json);
      }
    } catch (const quern::Error& error) {
      (void)error.three_lines();
    }
  }
  return 0;
}
