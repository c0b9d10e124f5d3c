// SPDX-License-Identifier: Apache-2.0
#include "pipeline/export.h"

#include "base/error.h"
#include "base/file.h"
#include "base/process.h"
#include "format/checkpoint.h"
#include "format/output_format.h"
#include "format/side_files.h"
#include "model/graph.h"
#include "pipeline/manifest.h"
#include "pipeline/output.h"
#include "pipeline/run_paths.h"
#include "pipeline/staging.h"
#include "quant/billm_matrix.h"
#include "quant/ggml_matrix.h"
#include "quant/mixed_rows.h"
#include "quant/packed_linear.h"
#include "tensor/divided.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <system_error>
#include <utility>
#include <vector>

namespace quern {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kDense = "dense";
constexpr const char* kMarker = ".quern-export";  // in a staging directory: it is ours

// A linear of the model that is stored in quantized form.
struct Source {
  const Linear* linear = nullptr;
  OutputModule module;
};

struct Export {
  std::unique_ptr<Checkpoint> checkpoint;
  ModelGraph graph;
  std::vector<Source> sources;
  std::vector<OutputModule> modules;  // all linears, quantized or not, for the configuration
  const OutputFormat* format = nullptr;  // null: dense
  DType dense_dtype = DType::kBF16;
};

// The matrix of a module. A module of an asymmetric model may happen to have all zero points in the
// middle; readers need one scheme for all parts of a merged module, so its zero points are written
// out again.
std::shared_ptr<const QuantizedMatrix> load_matrix(const Export& job, const Source& source) {
  const Linear& linear = *source.linear;
  StoredLinear stored =
      job.checkpoint->load_linear(linear.module, linear.out_features, linear.in_features);
  const auto* packed = dynamic_cast<const PackedLinear*>(stored.quantized.get());
  if (packed == nullptr || !packed->scheme.symmetric || source.module.scheme->symmetric) {
    return std::move(stored.quantized);
  }
  auto shifted = std::make_shared<PackedLinear>(*packed);
  shifted->scheme.symmetric = false;
  shifted->zeros.assign(
      shifted->scales.size(), static_cast<std::uint8_t>(shifted->scheme.symmetric_zero()));
  return shifted;
}

OutputModule describe(const Linear& linear) {
  OutputModule module;
  module.name = linear.module;
  module.out_features = linear.out_features;
  module.in_features = linear.in_features;
  module.is_embedding = linear.role == Role::kEmbedding;
  module.is_head = linear.role == Role::kHead;
  return module;
}

// The two tables differ in their width only, as quantize makes them.
void require_usual_form(const MixedRows& mixed, const std::string& where) {
  QuantScheme hot = mixed.cold.scheme;
  hot.bits = MixedRows::kHotBits;
  if (mixed.hot.scheme != hot || mixed.hot.scale_dtype != mixed.cold.scale_dtype ||
      !mixed.hot.group_index.empty() || !mixed.cold.group_index.empty()) {
    throw UnsupportedError(
        "a table of mixed rows that quern does not write",
        where,
        "expected tables that differ in their width only, found other differences",
        "use the checkpoint as quantize made it");
  }
}

OutputModule describe(const Linear& linear, const StoredLinear& stored) {
  OutputModule module = describe(linear);
  module.kind = stored.quantized->kind();
  if (stored.activation) {
    module.activation = *stored.activation;
  }
  // Of other kinds, what quern's container has to be told (quern_container.cpp).
  const QuantizedMatrix* matrix = stored.quantized.get();
  if (const auto* packed = dynamic_cast<const PackedLinear*>(matrix)) {
    module.scheme = packed->scheme;
    module.scale_dtype = packed->scale_dtype;
    module.has_group_index = !packed->group_index.empty();
  } else if (const auto* mixed = dynamic_cast<const MixedRows*>(matrix)) {
    require_usual_form(*mixed, linear.module);
    module.scheme = mixed->cold.scheme;
    module.scale_dtype = mixed->cold.scale_dtype;
    module.hot_rows = mixed->hot.out_features;
  } else if (const auto* billm = dynamic_cast<const BillmMatrix*>(matrix)) {
    module.scheme = QuantScheme{1, true, billm->block};
  } else if (const auto* ggml = dynamic_cast<const GgmlMatrix*>(matrix)) {
    if (!ggml->stored_columns.empty()) {
      throw UnsupportedError(
          "blocks whose columns stand in another order",
          linear.module,
          "GGUF files order value heads of DeltaNet in their own way",
          "export from the safetensors checkpoint");
    }
    module.scheme = QuantScheme();
    module.scheme->ggml = ggml->type;
  }
  return module;
}

void add_linear(Export& job, const Linear& linear, bool with_floats) {
  if (job.checkpoint->is_quantized(linear.module)) {
    const StoredLinear stored =
        job.checkpoint->load_linear(linear.module, linear.out_features, linear.in_features);
    job.sources.push_back({&linear, describe(linear, stored)});
  } else if (with_floats) {
    job.modules.push_back(describe(linear));
  }
}

bool has_grid(const Source& source) {
  return source.module.kind == PackedLinear::kKind && !source.module.is_embedding;
}

bool same_grid(const QuantScheme& a, const QuantScheme& b) {
  return a.bits == b.bits && a.group_size == b.group_size;
}

void give_all_zero_points(Export& job) {
  std::vector<QuantScheme> asymmetric;
  for (const Source& source : job.sources) {
    if (has_grid(source) && !source.module.scheme->symmetric) {
      asymmetric.push_back(*source.module.scheme);
    }
  }
  for (Source& source : job.sources) {
    if (has_grid(source)) {
      source.module.scheme->symmetric =
          std::none_of(asymmetric.begin(), asymmetric.end(), [&](const QuantScheme& scheme) {
            return same_grid(scheme, *source.module.scheme);
          });
    }
  }
}

Export open_export(const ExportOptions& options) {
  Export job;
  job.checkpoint = open_checkpoint(options.model);
  job.graph = build_graph(*job.checkpoint);
  check_tensors(job.graph, *job.checkpoint);
  add_linear(job, job.graph.embedding, false);
  for (const Block& block : job.graph.blocks) {
    for (const Linear& linear : block.linears) {
      add_linear(job, linear, true);
    }
  }
  if (!job.graph.head_tied) {
    add_linear(job, job.graph.head, false);
  }
  if (job.sources.empty()) {
    throw UsageError(
        "the model has no quantized linears",
        options.model.string(),
        "found the format " + job.checkpoint->format(),
        "quern quantize");
  }
  give_all_zero_points(job);
  for (Source& source : job.sources) {
    source.module.is_head =
        source.module.is_head || (source.module.is_embedding && job.graph.head_tied);
    job.modules.push_back(source.module);
  }
  return job;
}

// Scales keep the type that they were stored in, unless the format has one of its own.
OutputModule module_for(const OutputFormat& format, OutputModule module, DType model) {
  if (format.storage(model, module).scale_dtype == DType::kF32) {
    module.scale_dtype = DType::kF32;
  }
  return module;
}

QuantScheme common_scheme(const Export& job) {
  std::vector<std::pair<QuantScheme, int>> counts;
  for (const Source& source : job.sources) {
    const std::optional<QuantScheme>& scheme = source.module.scheme;
    if (!has_grid(source) || source.module.is_head) {
      continue;
    }
    const auto found = std::find_if(
        counts.begin(), counts.end(), [&](const auto& each) { return each.first == *scheme; });
    ++(found == counts.end() ? counts.emplace_back(*scheme, 0) : *found).second;
  }
  const auto most =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;
      });
  return most == counts.end() ? QuantScheme() : most->first;
}

Json config_of(const Export& job, const OutputFormat& format, const Json& meta) {
  std::vector<OutputModule> modules;
  for (const OutputModule& module : job.modules) {
    modules.push_back(module.scheme ? module_for(format, module, job.graph.config.dtype) : module);
  }
  for (OutputModule& module : modules_in_floats(job.graph, job.checkpoint->tensors())) {
    modules.push_back(std::move(module));
  }
  return format.config(common_scheme(job), modules, meta);
}

// Throws UnsupportedError when the format cannot hold the model exactly.
void require_holds(const Export& job, const OutputFormat& format) {
  for (const Source& source : job.sources) {
    format.check(module_for(format, source.module, job.graph.config.dtype));
  }
  (void)config_of(job, format, Json::object());
  for (const Source& source : job.sources) {
    const OutputModule module = module_for(format, source.module, job.graph.config.dtype);
    (void)format.pack(*load_matrix(job, source), module);
  }
}

bool holds(const Export& job, const OutputFormat& format) {
  if (format.is_gguf) {
    return false;
  }
  try {
    require_holds(job, format);
    return true;
  } catch (const UnsupportedError&) {
    return false;
  }
}

bool has_integer_inputs(const Export& job) {
  return std::any_of(job.sources.begin(), job.sources.end(), [](const Source& source) {
    return source.module.activation.active();
  });
}

// "gptq" of gptq, gptq_v2 and gptq_p.
std::string family(std::string_view format) {
  return std::string(format.starts_with("gptq") ? "gptq" : format);
}

const OutputFormat& choose_format(
    const Context& ctx, const Export& job, const std::string& requested) {
  const OutputFormat& format = find_output_format(requested);
  if (format.is_gguf) {
    throw UnsupportedError(
        "export rounds nothing into GGUF",
        "--format " + requested,
        "GGUF has types of its own, for which quantize chooses codes and scales",
        "quern quantize ORIGINAL -o OUT.gguf --format " + requested);
  }
  try {
    require_holds(job, format);
    return format;
  } catch (const UnsupportedError& error) {
    const OutputFormat* nearest = nullptr;
    std::string others = has_integer_inputs(job) ? "" : "dense with --dtype float32";
    for (const OutputFormat& other : output_formats()) {
      if (&other != &format && holds(job, other)) {
        nearest = nearest == nullptr ? &other : nearest;
        others += (others.empty() ? "" : ", ") + std::string(other.name);
      }
    }
    if (nearest != nullptr && family(job.checkpoint->format()) == family(requested)) {
      ctx.log.warning(fmt::format(
          "{}: {} ({}); writing {}, the nearest format that holds it",
          error.where(),
          error.failed(),
          error.reason(),
          nearest->name));
      return *nearest;
    }
    throw UnsupportedError(
        error.failed(),
        error.where(),
        error.reason(),
        fmt::format("formats that hold this model: {}", others));
  }
}

DType parse_dtype(const std::string& text, DType model) {
  constexpr std::array<std::pair<std::string_view, DType>, 3> kNames = {
      {{"float32", DType::kF32}, {"float16", DType::kF16}, {"bfloat16", DType::kBF16}}};
  if (text.empty()) {
    return model;
  }
  const auto* const found = std::find_if(
      kNames.begin(), kNames.end(), [&](const auto& name) { return name.first == text; });
  if (found == kNames.end()) {
    throw UsageError(
        "not a type of weights",
        "--dtype " + text,
        "expected float32, float16 or bfloat16",
        "--dtype float32");
  }
  return found->second;
}

// --- writing -----------------------------------------------------------------------------------

std::vector<TensorDeclaration> declarations_of(const Export& job, const Source& source) {
  const Linear& linear = *source.linear;
  if (job.format == nullptr) {
    return {{linear.weight(), job.dense_dtype, {linear.out_features, linear.in_features}}};
  }
  return job.format->declare(module_for(*job.format, source.module, job.graph.config.dtype));
}

// Whether a tensor of the source is part of a quantized module ("MODULE.scales",
// "MODULE.hot.codes"), and not its bias.
bool is_replaced(const std::set<std::string>& modules, const std::string& tensor) {
  for (std::size_t dot = tensor.find('.'); dot != std::string::npos;
       dot = tensor.find('.', dot + 1)) {
    if (modules.contains(tensor.substr(0, dot))) {
      return tensor.substr(dot) != ".bias";
    }
  }
  return false;
}

// The tensors that are copied as they are.
std::vector<std::string> copied_tensors(const Export& job) {
  std::set<std::string> modules;
  for (const Source& source : job.sources) {
    modules.insert(source.module.name);
  }
  std::vector<std::string> copied;
  for (const auto& [name, view] : job.checkpoint->tensors().tensors()) {
    if (!is_replaced(modules, name)) {
      copied.push_back(name);
    }
  }
  return copied;
}

// Calls visit(first row, bytes) for the dequantized matrix in the dtype of the output, some rows at
// a time.
template <class Visit>
void for_dense_rows(const Context& ctx, const QuantizedMatrix& matrix, DType dtype, Visit visit) {
  constexpr std::int64_t kRows = 256;
  const auto width = static_cast<std::size_t>(matrix.in_features);
  std::vector<float> values(static_cast<std::size_t>(kRows) * width);
  for (std::int64_t begin = 0; begin < matrix.out_features; begin += kRows) {
    const std::int64_t rows = std::min(kRows, matrix.out_features - begin);
    ctx.pool.for_chunks(rows, 16, [&](std::int64_t from, std::int64_t to, int) {
      std::vector<std::uint8_t> scratch(width);
      for (std::int64_t r = from; r < to; ++r) {
        matrix.dequantize_row(
            ctx.kernels,
            begin + r,
            scratch,
            std::span(values).subspan(static_cast<std::size_t>(r) * width, width));
      }
    });
    visit(
        begin, from_float(std::span(values).first(static_cast<std::size_t>(rows) * width), dtype));
  }
}

void stop_if_interrupted(const Context& ctx) {
  if (ctx.interrupted()) {
    throw InterruptedError(
        "export interrupted", "", "the output was not made", "run the same command again");
  }
}

void write_module(
    const Context& ctx, const Export& job, const Source& source, SafetensorsWriter& writer) {
  stop_if_interrupted(ctx);
  const auto matrix = load_matrix(job, source);
  const auto declarations = declarations_of(job, source);
  if (job.format == nullptr) {
    for_dense_rows(ctx, *matrix, job.dense_dtype, [&](std::int64_t, const auto& bytes) {
      writer.append(declarations.front().name, bytes);
    });
    return;
  }
  const auto tensors =
      job.format->pack(*matrix, module_for(*job.format, source.module, job.graph.config.dtype));
  for (std::size_t i = 0; i < declarations.size(); ++i) {
    writer.write(declarations[i].name, tensors[i]);
  }
}

bool unties_table(const Export& job) {
  return job.format != nullptr && job.format->unties_tables &&
         std::any_of(job.sources.begin(), job.sources.end(), [](const Source& source) {
           return source.module.is_embedding && source.module.is_head;
         });
}

Json with_dtype(Json config, DType dtype) {
  const char* name = dtype == DType::kF32   ? "float32"
                     : dtype == DType::kF16 ? "float16"
                                            : "bfloat16";
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (config.contains(key)) {
      config[key] = name;
    }
  }
  return config;
}

// Where the result is put together; removed again unless it got its name.
class Staging {
 public:
  explicit Staging(const fs::path& directory) : directory_(directory), lock_(directory) {
    if (!fs::exists(directory_ / kMarker) && !fs::is_empty(directory_)) {
      throw UsageError(
          "a directory is in the way",
          directory_.string(),
          "the result is put together there, and it holds files of something else",
          "move it away, or choose another output");
    }
    clear();
    write_file(directory_ / kMarker, "");
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging() {
    if (!placed_) {
      clear();
    }
  }
  [[nodiscard]] const fs::path& path() const noexcept { return directory_; }
  void place(const fs::path& output, bool force) {
    fs::remove(directory_ / kMarker);
    put_in_place(directory_, output, force);
    placed_ = true;
  }

 private:
  void clear() noexcept {
    std::error_code code;
    // The marker goes last: what is left of a killed run can be told.
    for (const auto& entry : fs::directory_iterator(directory_, code)) {
      if (entry.path().filename() != kMarker) {
        fs::remove_all(entry.path(), code);
      }
    }
    fs::remove(directory_ / kMarker, code);
  }

  fs::path directory_;
  DirectoryLock lock_;
  bool placed_ = false;
};

// --- reading back ------------------------------------------------------------------------------

[[noreturn]] void throw_mismatch(const std::string& name) {
  throw Error(
      ErrorKind::kFailed,
      "the written checkpoint does not read back as it was made",
      name,
      "its values differ from the source's",
      "check disk and memory, then run the same command again");
}

bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

void verify_module(
    const Context& ctx, const Export& job, const Source& source, const Checkpoint& written) {
  const Linear& linear = *source.linear;
  const StoredLinear stored =
      written.load_linear(linear.module, linear.out_features, linear.in_features);
  const auto matrix = load_matrix(job, source);
  if (job.format != nullptr) {
    const bool same_inputs =
        (stored.activation ? *stored.activation : ActivationScheme()) == source.module.activation;
    if (!stored.quantized || !same_inputs || !same_values(ctx, *stored.quantized, *matrix)) {
      throw_mismatch(linear.module);
    }
    return;
  }
  if (!stored.dense || stored.dense->dtype != job.dense_dtype) {
    throw_mismatch(linear.module);
  }
  for_dense_rows(ctx, *matrix, job.dense_dtype, [&](std::int64_t begin, const auto& bytes) {
    const std::int64_t row =
        static_cast<std::int64_t>(dtype_size(job.dense_dtype)) * linear.in_features;
    if (!same_bytes(
            stored.dense->bytes.subspan(static_cast<std::size_t>(begin * row), bytes.size()),
            bytes)) {
      throw_mismatch(linear.module);
    }
  });
}

Census verify_export(
    const Context& ctx,
    const Export& job,
    const std::vector<std::string>& copied,
    std::size_t declared,
    const fs::path& directory) {
  const auto written = open_checkpoint(directory);
  const TensorStore& store = job.checkpoint->tensors();
  for (const std::string& name : copied) {
    const TensorView* before = store.find(name);
    const TensorView* copy = written->tensors().find(name);
    if (copy == nullptr || copy->dtype != before->dtype || copy->shape != before->shape ||
        !same_bytes(copy->bytes, before->bytes)) {
      throw_mismatch(name);
    }
    written->tensors().release(*copy);
    store.release(*before);
  }
  for (const Source& source : job.sources) {
    stop_if_interrupted(ctx);
    verify_module(ctx, job, source, *written);
  }
  Census census;
  census.in = tensors_in_files(store);
  census.divided = divided_tensors(store);
  census.out = tensors_in_files(written->tensors());
  if (census.out != static_cast<std::int64_t>(declared)) {
    throw_mismatch("tensor census");
  }
  return census;
}

Json linears_json(const Export& job) {
  Json linears = Json::array();
  for (const Source& source : job.sources) {
    const OutputModule& module = source.module;
    Json entry = {
        {"name", module.name},
        {"role", role_name(source.linear->role)},
        {"shape", {module.out_features, module.in_features}},
        {"kind", module.kind}};
    if (module.scheme) {
      entry["bits"] = module.scheme->bits;
      entry["group_size"] = module.scheme->group_size == 0 ? -1 : module.scheme->group_size;
      entry["symmetric"] = module.scheme->symmetric;
    }
    linears.push_back(std::move(entry));
  }
  return linears;
}

}  // namespace

namespace {

// GGUF keeps its types: the file as it is, opened and checked under its new name.
Json copy_gguf(const ExportOptions& options, const Checkpoint& checkpoint, double started) {
  const std::vector<fs::path> files = checkpoint.self_contained_files();
  if (files.size() != 1) {
    throw UnsupportedError(
        "a GGUF model in several files",
        options.model.string(),
        "expected one file",
        "llama-gguf-split --merge");
  }
  const bool is_file = options.output.extension() == ".gguf";
  const RunPaths paths = resolve_run_paths(options.output, {}, files.front().parent_path());
  refuse_occupied(paths.output, options.force);
  const DirectoryLock lock(paths.staging);
  const fs::path copy = paths.staging / (is_file ? paths.output.filename() : kGgufInDirectory);
  check_disk(fs::file_size(files.front()), paths.staging);
  fs::copy_file(files.front(), copy, fs::copy_options::overwrite_existing);
  if (sha256_of_file(copy) != sha256_of_file(files.front())) {
    throw_mismatch(copy.filename().string());
  }
  const auto written = open_checkpoint(copy);
  const ModelGraph graph = build_graph(*written);
  const std::uint64_t bytes = fs::file_size(copy);
  put_in_place(is_file ? copy : paths.staging, paths.output, options.force);
  return {
      {"schema", kExportSchema},
      {"output", options.output.string()},
      {"source", options.model.string()},
      {"format", "gguf"},
      {"linears", Json::array()},
      {"bits_per_weight", bits_per_weight(bytes, parameters_of(graph))},
      {"bytes", bytes},
      {"seconds", steady_seconds() - started}};
}

}  // namespace

Json export_checkpoint(const Context& ctx, const ExportOptions& options) {
  const double started = steady_seconds();
  if (options.format == "gguf") {
    const auto checkpoint = open_checkpoint(options.model);
    if (checkpoint->format() == "gguf") {
      return copy_gguf(options, *checkpoint, started);
    }
  }
  if (!options.dtype.empty() && options.format != kDense) {
    throw UsageError(
        "a dtype is for dense weights only",
        "--dtype " + options.dtype,
        "other formats keep codes and scales as they are",
        "--format dense");
  }
  Export job = open_export(options);
  const RunPaths paths = resolve_run_paths(options.output, {}, job.checkpoint->directory());
  refuse_occupied(paths.output, options.force);
  if (options.format == kDense) {
    job.dense_dtype = parse_dtype(options.dtype, job.graph.config.dtype);
  } else {
    job.format = &choose_format(ctx, job, options.format);
  }
  if (job.format == nullptr && has_integer_inputs(job)) {
    ctx.log.warning("the model has integer inputs; as a dense one it computes with floats");
  }
  const std::string format(job.format == nullptr ? kDense : job.format->name);

  const TensorStore& store = job.checkpoint->tensors();
  const std::vector<std::string> copied = copied_tensors(job);
  std::vector<TensorDeclaration> declarations;
  for (const std::string& name : copied) {
    const TensorView& view = *store.find(name);
    declarations.push_back({name, view.dtype, view.shape});
  }
  for (const Source& source : job.sources) {
    for (TensorDeclaration& declaration : declarations_of(job, source)) {
      declarations.push_back(std::move(declaration));
    }
  }
  SafetensorsOptions layout_options;
  layout_options.max_file_bytes = options.shard_bytes;
  const SafetensorsLayout layout = plan_safetensors(declarations, layout_options);
  Staging staging(paths.staging);
  check_disk(layout.total_bytes(), staging.path());
  {
    SafetensorsWriter writer(staging.path(), layout);
    for (const std::string& name : copied) {
      const TensorView& view = *store.find(name);
      writer.write(name, view.bytes);
      store.release(view);
    }
    for (const Source& source : job.sources) {
      write_module(ctx, job, source, writer);
    }
    writer.finish();
  }
  const Json meta = {{"exported_from", job.checkpoint->format()}};
  Json config = job.format == nullptr ? with_dtype(job.checkpoint->config(), job.dense_dtype)
                                      : job.checkpoint->config();
  if (unties_table(job)) {
    config = untied_config(std::move(config));
    ctx.log.warning(untied_text(job.graph.embedding.module, job.format->name));
  }
  write_configs(
      config,
      job.format == nullptr ? Json(nullptr) : config_of(job, *job.format, meta),
      job.format == nullptr ? std::string_view() : job.format->config_file,
      staging.path());
  SideFiles side_files;
  if (job.checkpoint->self_contained_files().empty()) {
    side_files = copy_side_files(job.checkpoint->directory(), staging.path());
  } else {
    ctx.log.warning("the tokenizer stays in the .gguf file; copy the original's beside the result");
  }
  const Census census = verify_export(ctx, job, copied, declarations.size(), staging.path());

  const std::int64_t parameters = parameters_of(job.graph);
  Json files = files_json(staging.path());
  const std::uint64_t bytes = total_size(files);
  const Json manifest = {
      {"schema", kExportSchema},
      {"program", program_json(ctx)},
      {"output", paths.output.filename().string()},
      {"source", source_json(*job.checkpoint, parameters)},
      {"source_format", job.checkpoint->format()},
      {"requested_format", options.format},
      {"format", format},
      {"bits_per_weight", bits_per_weight(bytes, parameters)},
      {"bytes", bytes},
      {"parameters", parameters},
      {"seconds", steady_seconds() - started},
      {"peak_rss_bytes", process_usage().peak_rss_bytes},
      {"linears", linears_json(job)},
      {"census", census_json(census)},
      {"files", std::move(files)},
      {"side_files", side_files_json(side_files)},
      {"command", options.command}};
  write_file(
      staging.path() / kManifestName,
      manifest.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
  staging.place(paths.output, options.force);
  return manifest;
}

}  // namespace quern
