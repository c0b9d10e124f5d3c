// SPDX-License-Identifier: Apache-2.0
#include "base/process.h"
#include "base/units.h"
#include "cli/verb.h"
#include "format/output_format.h"
#include "model/graph.h"
#include "quant/method.h"
#include "quern/version.h"

#include <fmt/format.h>

namespace quern {
namespace {

Json features_json(const CpuFeatures& cpu) {
  return {
      {"name", cpu.name},
      {"avx2", cpu.avx2},
      {"avx512", cpu.avx512},
      {"avx512_vnni", cpu.avx512_vnni},
      {"avx512_bf16", cpu.avx512_bf16},
      {"amx_bf16", cpu.amx_bf16}};
}

template <class Rows, class Name>
Json names(const Rows& rows, Name name) {
  Json list = Json::array();
  for (const auto& row : rows) {
    list.push_back(row.*name);
  }
  return list;
}

int run_info(Session& session) {
  const Context& ctx = session.context();
  Json kernels = Json::array();
  std::string text = fmt::format(
      "quern {} ({})\ncpu      {}\nisa      {}\nblas     {}\nthreads  {}\nmemory   {}\n\nkernels\n",
      kVersion,
      kCommit,
      session.cpu().name,
      ctx.kernels.isa,
      ctx.blas.description(),
      ctx.pool.size(),
      human_bytes(static_cast<double>(memory_limit())));
  for (const KernelTable::Choice& choice : ctx.kernels.choices) {
    kernels.push_back(
        {{"name", choice.operation}, {"level", choice.level}, {"refused", choice.refused}});
    text += fmt::format("  {:<18} {:<8} {}\n", choice.operation, choice.level, choice.refused);
  }
  const Json document = {
      {"schema", "quern.info/1"},
      {"version", kVersion},
      {"commit", kCommit},
      {"cpu", features_json(session.cpu())},
      {"isa", ctx.kernels.isa},
      {"blas", ctx.blas.description()},
      {"threads", ctx.pool.size()},
      {"memory_bytes", memory_limit()},
      {"kernels", std::move(kernels)},
      {"families", names(families(), &Family::model_type)},
      {"methods", names(methods(), &Method::name)},
      {"formats", names(output_formats(), &OutputFormat::name)}};
  session.print_json(document);
  session.print_text(text);
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_info(CLI::App& app) {
  add_footer(app, "  quern info\n  quern info --json\n  quern info --isa scalar\n");
  return run_info;
}

}  // namespace quern
