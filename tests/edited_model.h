// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"
#include "base/json.h"
#include "format/safetensors.h"
#include "format/safetensors_writer.h"
#include "running_model.h"
#include "scratch.h"

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace quern::testing {

struct EditedTensor {
  DType dtype = DType::kBF16;
  Shape shape;
  std::vector<float> values;
};
using EditedTensors = std::map<std::string, EditedTensor>;

// A model of testdata/ with other tensors or another configuration, in a directory of its own.
class EditedModel {
 public:
  EditedModel(
      const std::filesystem::path& source,
      const std::function<void(EditedTensors&)>& edit_tensors,
      const std::function<void(Json&)>& edit_config = nullptr) {
    const auto store = SafetensorsStore::open(source);
    EditedTensors tensors;
    for (const auto& [name, view] : store->tensors()) {
      tensors[name] = {view.dtype, view.shape, to_float(view)};
    }
    if (edit_tensors) {
      edit_tensors(tensors);
    }
    std::vector<TensorDeclaration> declarations;
    for (const auto& [name, tensor] : tensors) {
      declarations.push_back({name, tensor.dtype, tensor.shape});
    }
    SafetensorsWriter writer(scratch_.path(), plan_safetensors(declarations, {}));
    for (const auto& [name, tensor] : tensors) {
      writer.write(name, from_float(tensor.values, tensor.dtype));
    }
    writer.finish();
    Json config = read_json(source / "config.json");
    if (edit_config) {
      edit_config(config);
    }
    write_file(scratch_.path() / "config.json", config.dump());
  }

  [[nodiscard]] const std::filesystem::path& path() const { return scratch_.path(); }

 private:
  ScratchDirectory scratch_;
};

}  // namespace quern::testing
