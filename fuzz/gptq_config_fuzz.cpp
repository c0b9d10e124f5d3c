// SPDX-License-Identifier: Apache-2.0
// quantization_config as arbitrary JSON, its rules on module names, and what is read written again.
#include "base/error.h"
#include "format/gptq_config.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const quern::Json json = quern::parse_json(text, "input");
    const quern::GptqConfig config = quern::read_gptq_config(json, "input");
    std::vector<quern::GptqModule> modules;
    for (const char* name :
         {"model.layers.0.mlp.up_proj", "model.layers.31.self_attn.o_proj", "lm_head"}) {
      modules.push_back({name, config.scheme_for(name)});
    }
    const quern::Json written = quern::gptq_config_json(config.scheme, config.version, modules);
    const quern::GptqConfig again = quern::read_gptq_config(written, "written");
    for (const quern::GptqModule& module : modules) {
      if (module.name != "lm_head" && again.scheme_for(module.name) != module.scheme) {
        std::abort();
      }
    }
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
