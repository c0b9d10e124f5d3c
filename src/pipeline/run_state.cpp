// SPDX-License-Identifier: Apache-2.0
#include "pipeline/run_state.h"

#include "base/error.h"
#include "base/file.h"
#include "format/safetensors.h"
#include "format/safetensors_writer.h"
#include "quant/activation.h"

#include <fmt/format.h>

#include <system_error>
#include <utility>

namespace quern {
namespace {

constexpr const char* kReportKey = "quern.block";
constexpr const char* kStateName = "state.json";
constexpr const char* kPartialStateName = ".state.json.partial";
constexpr const char* kLayersName = "layers";
constexpr const char* kPartExtension = ".safetensors";
const std::string kInputsPrefix = "inputs of ";

// The directory is emptied at the end: it must not be one that people keep other things in.
void refuse_strangers(const std::filesystem::path& directory) {
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name != kStateName && name != kPartialStateName && name != kLayersName) {
      throw UsageError(
          "the work directory holds other files",
          directory.string(),
          "found " + name,
          "give --work-dir a directory of its own");
    }
  }
}

// Keys whose values differ, for the message.
std::string differences(const Json& before, const Json& now) {
  std::string text;
  for (const auto& [key, value] : now.items()) {
    const auto found = before.find(key);
    if (found == before.end() || *found != value) {
      text += (text.empty() ? "" : ", ") + key;
    }
  }
  return text.empty() ? "the kind of state" : text;
}

// An unreadable state is that of another run.
Json read_state(const std::filesystem::path& path) {
  try {
    return read_json(path);
  } catch (const Error&) {
    return Json::object();
  }
}

std::optional<double> optional_number(const JsonReader& reader, const std::string& key) {
  return reader.has(key) ? std::optional<double>(reader.get_number(key)) : std::nullopt;
}

void read_report(const JsonReader& reader, QuantizedLinear& linear) {
  LinearReport& report = linear.report;
  report.method = reader.get_string("method");
  report.order = reader.get_string("order");
  report.damping = reader.get_number("damping");
  report.tokens = reader.get_int("tokens");
  report.borrowed_tokens = reader.get_int("borrowed_tokens");
  report.dead_columns = reader.get_int("dead_columns");
  report.mismatch_strength = reader.get_number("mismatch_strength");
  report.relative_error = reader.get_number("relative_error");
  report.holdout_error = optional_number(reader, "holdout_error");
  report.rtn_error = optional_number(reader, "rtn_error");
  if (reader.has("fallback")) {
    report.fallback = reader.get_string("fallback");
  }
  report.clip_threshold = optional_number(reader, "clip_threshold");
  if (reader.has("range_errors")) {
    const JsonReader errors = reader.get_object("range_errors");
    for (const auto& [name, error] : errors.json().items()) {
      if (const auto range = range_from_name(name)) {
        report.range_errors.push_back({*range, errors.get_number(name)});
      }
    }
  }
  if (reader.has("activation")) {
    linear.activation = read_activation(reader.get_object("activation"));
  }
  linear.seconds = reader.get_number("seconds");
}

}  // namespace

Json report_json(const QuantizedLinear& linear) {
  const LinearReport& report = linear.report;
  const auto optional = [](const std::optional<double>& value) {
    return value ? Json(*value) : Json(nullptr);
  };
  Json range_errors;
  for (const RangeError& each : report.range_errors) {
    range_errors[range_name(each.range)] = each.error;
  }
  return {
      {"name", linear.plan->name},
      {"layer", linear.plan->layer},
      {"role", role_name(linear.plan->role)},
      {"shape", {linear.plan->out_features, linear.plan->in_features}},
      {"method", report.method},
      {"bits", linear.plan->scheme.bits},
      {"group_size", linear.plan->scheme.group_size == 0 ? -1 : linear.plan->scheme.group_size},
      {"symmetric", linear.plan->scheme.symmetric},
      {"activation",
       linear.activation.active() ? activation_json(linear.activation) : Json(nullptr)},
      {"order", report.order},
      {"tokens", report.tokens},
      {"borrowed_tokens", report.borrowed_tokens},
      {"relative_error", report.relative_error},
      {"holdout_error", optional(report.holdout_error)},
      {"rtn_error", optional(report.rtn_error)},
      {"damping", report.damping},
      {"mismatch_strength", report.mismatch_strength},
      {"dead_columns", report.dead_columns},
      {"clip_threshold", optional(report.clip_threshold)},
      {"range_errors", std::move(range_errors)},
      {"fallback", report.fallback ? Json(*report.fallback) : Json(nullptr)},
      {"rule", linear.plan->reason},
      {"bytes", linear.matrix->stored_bytes()},
      {"stored_bits",
       8.0 * static_cast<double>(linear.matrix->stored_bytes()) /
           static_cast<double>(linear.plan->out_features * linear.plan->in_features)},
      {"seconds", linear.seconds}};
}

RunState::RunState(std::filesystem::path directory, const Json& fingerprint, bool resume)
    : directory_(std::move(directory)), lock_(directory_) {
  refuse_strangers(directory_);
  const std::filesystem::path state = directory_ / kStateName;
  if (is_started(directory_) && resume) {
    const Json before = read_state(state);
    if (before != fingerprint) {
      throw UsageError(
          "the work directory belongs to another run",
          directory_.string(),
          "changed: " + differences(before, fingerprint),
          "give the same options as before, or --no-resume to begin anew");
    }
  } else {
    remove();  // blocks without a state could be of any run
    write_file(state, fingerprint.dump(1) + "\n");
  }
  std::error_code code;
  std::filesystem::create_directories(directory_ / kLayersName, code);
  if (code) {
    throw IoError(
        "cannot make the work directory",
        directory_.string(),
        code.message(),
        "choose another with --work-dir",
        ErrorKind::kFailed);
  }
}

bool RunState::is_started(const std::filesystem::path& directory) {
  return std::filesystem::exists(directory / kStateName);
}

std::filesystem::path RunState::part_path(const std::string& part) const {
  return directory_ / kLayersName / (part + kPartExtension);
}

bool RunState::holds(const std::string& part) const {
  if (!std::filesystem::exists(part_path(part))) {
    return false;
  }
  try {
    return SafetensorsStore::open(part_path(part)) != nullptr;  // checks the length
  } catch (const Error&) {
    return false;
  }
}

int RunState::parts_saved() const {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory_ / kLayersName)) {
    count += entry.path().extension() == kPartExtension ? 1 : 0;
  }
  return count;
}

void RunState::save(const std::string& part_name, const QuantizedBlock& done) const {
  std::vector<TensorDeclaration> declarations;
  std::vector<MatrixPart> parts;
  Json reports = Json::array();
  for (const QuantizedLinear& linear : done.linears) {
    for (MatrixPart& part : linear.matrix->parts()) {
      part.name = linear.plan->name + "." + part.name;
      declarations.push_back({part.name, part.dtype, part.shape});
      parts.push_back(std::move(part));
    }
    Json report = report_json(linear);
    report["kind"] = linear.matrix->kind();
    report["parameters"] = linear.matrix->parameters();
    reports.push_back(std::move(report));
  }
  Json replaced = Json::array();
  for (const ReplacedTensor& tensor : done.tensors) {
    declarations.push_back({tensor.name, tensor.dtype, tensor.shape});
    parts.push_back({tensor.name, tensor.dtype, tensor.shape, tensor.bytes});
    replaced.push_back(tensor.name);
  }
  Json inputs = Json::object();
  for (const InputSquares& squares : done.inputs) {
    const auto width = static_cast<std::int64_t>(squares.sums.size());
    MatrixPart part{
        kInputsPrefix + squares.name, DType::kF32, {width}, from_float(squares.sums, DType::kF32)};
    declarations.push_back({part.name, part.dtype, part.shape});
    parts.push_back(std::move(part));
    inputs[squares.name] = squares.rows;
  }
  const Json document = {
      {"linears", std::move(reports)},
      {"inputs", std::move(inputs)},
      {"replaced", std::move(replaced)},
      {"transforms", done.transforms}};
  SafetensorsOptions options;
  options.max_file_bytes = UINT64_MAX;
  options.metadata = {{kReportKey, document.dump()}};
  const SafetensorsLayout layout = plan_safetensors(declarations, options);
  AtomicFile file(part_path(part_name));
  file.write(layout.files.front().header);
  for (const MatrixPart& part : parts) {
    file.write_at(layout.slots.at(part.name).offset, part.bytes);
  }
  file.commit();
}

std::optional<QuantizedBlock> RunState::load(
    const std::string& part_name, const QuantPlan& plan) const {
  const std::filesystem::path path = part_path(part_name);
  if (!std::filesystem::exists(path)) {
    return std::nullopt;
  }
  try {
    const auto store = SafetensorsStore::open(path);
    const MappedFile file(path);
    const SafetensorsContent content = parse_safetensors(file.bytes(), path.string());
    const Json document = parse_json(content.metadata.at(kReportKey), path.string());
    const JsonReader top(document, path.string());
    QuantizedBlock done;
    done.transforms = top.get_array("transforms");
    for (const Json& name : top.get_array("replaced")) {
      const TensorView* view = store->find(name.get<std::string>());
      if (view == nullptr) {
        return std::nullopt;
      }
      done.tensors.push_back(
          {name.get<std::string>(),
           view->dtype,
           view->shape,
           {view->bytes.begin(), view->bytes.end()}});
    }
    const JsonReader inputs = top.get_object("inputs");
    for (const auto& [name, rows] : inputs.json().items()) {
      const TensorView* view = store->find(kInputsPrefix + name);
      if (view == nullptr || view->dtype != DType::kF32) {
        return std::nullopt;
      }
      done.inputs.push_back({name, to_float(*view), inputs.get_int(name)});
    }
    for (const Json& entry : top.get_array("linears")) {
      const JsonReader reader(entry, path.string());
      QuantizedLinear linear;
      linear.plan = plan.find(reader.get_string("name"));
      if (linear.plan == nullptr) {
        return std::nullopt;
      }
      read_report(reader, linear);
      const std::string& name = linear.plan->name;
      linear.matrix = restore_matrix(
          reader.get_string("kind"),
          linear.plan->out_features,
          linear.plan->in_features,
          reader.get_object("parameters"),
          [&](const std::string& part) { return store->find(name + "." + part); },
          path.string() + ": " + name);
      done.linears.push_back(std::move(linear));
    }
    return done;
  } catch (const Error&) {
    return std::nullopt;  // a broken state file costs one block of work, not the run
  } catch (const std::out_of_range&) {
    return std::nullopt;
  } catch (const Json::exception&) {
    return std::nullopt;
  }
}

void RunState::remove_leftover(const std::filesystem::path& directory, const Json& fingerprint) {
  if (!is_started(directory) || read_state(directory / kStateName) != fingerprint) {
    return;
  }
  try {
    RunState(directory, fingerprint, true).remove();
  } catch (const Error&) {
    return;  // another run holds it, and will remove it
  }
}

void RunState::remove() const {
  // The state goes last: without it the blocks count for nothing.
  std::error_code code;
  std::filesystem::remove_all(directory_ / kLayersName, code);
  std::filesystem::remove(directory_ / kPartialStateName, code);
  std::filesystem::remove(directory_ / kStateName, code);
}

}  // namespace quern
