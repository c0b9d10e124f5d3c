// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/cpu.h"
#include "base/file.h"
#include "base/json.h"
#include "format/safetensors.h"
#include "kernels/kernels.h"

#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace quern::testing {

inline std::string golden_path(const std::string& name) {
  return std::string(QUERN_TESTDATA) + "/golden/formats/" + name;
}

template <class T>
std::vector<T> values_of(const TensorView& view) {
  std::vector<T> values(view.bytes.size() / sizeof(T));
  std::memcpy(values.data(), view.bytes.data(), values.size() * sizeof(T));
  return values;
}

inline const KernelTable& test_kernels() {
  static const KernelTable kTable = make_kernel_table(detect_cpu(), "");
  return kTable;
}

}  // namespace quern::testing
