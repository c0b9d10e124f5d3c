// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "cli/verb.h"
#include "quern/version.h"

#include <fmt/format.h>

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <exception>
#include <new>

namespace quern {
namespace {

// clang-format off
constexpr std::array kVerbs = {
    Verb{"quantize", "make a quantized checkpoint", configure_quantize},
    Verb{"plan", "what quantize would do: bytes, memory, time; a plan that a person can edit", configure_plan},
    Verb{"inspect", "architecture, tensors, quantization, and what makes this model hard to quantize", configure_inspect},
    Verb{"eval", "perplexity, and divergence from a reference", configure_eval},
    Verb{"compare", "how far two checkpoints of a model are apart: weights, and end to end", configure_compare},
    Verb{"export", "rewrite a quantized checkpoint in another format, exactly", configure_export},
    Verb{"verify", "integrity and census of a checkpoint, against its source", configure_verify},
    Verb{"report", "the HTML report and the summary table of a finished run", configure_report},
    Verb{"generate", "complete a text", configure_generate},
    Verb{"logits", "logits for given token ids", configure_logits},
    Verb{"tokenize", "token ids of texts", configure_tokenize},
    Verb{"info", "version, CPU features, chosen kernels and why others were refused", configure_info},
    Verb{"doctor", "whether this machine is fit: CPU, memory, disk, libraries", configure_doctor},
};
// clang-format on

void add_global_options(CLI::App& app, GlobalOptions& options) {
  app.add_option("--threads,-j", options.threads, "threads (default: all usable CPUs)")
      ->check(CLI::Range(1, 4096))
      ->group("Global");
  app.add_option(
         "--memory",
         options.memory,
         "bound of the process's own memory, e.g. 3GiB (default: 90 % of what is there)")
      ->group("Global");
  app.add_option(
         "--isa", options.isa, "instruction set: scalar, avx2 or avx512 (default: the best)")
      ->group("Global");
  app.add_option("--seed", options.seed, "seed of everything random (default: 0)")
      ->check(number_within(0, 0x1p64))
      ->group("Global");
  app.add_flag("--json", options.json, "one JSON document on stdout")->group("Global");
  app.add_flag("--quiet,-q", options.quiet, "errors only")->group("Global");
  app.add_flag("--verbose,-v", options.verbose, "decisions as well")->group("Global");
  app.add_option("--log-format", options.log_format, "text or json lines on stderr (default: text)")
      ->check(CLI::IsMember({"text", "json"}))
      ->group("Global");
}

// Edits (insert, delete, replace) that turn one word into the other.
std::size_t distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) {
    row[j] = j;
  }
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

std::string nearest_verb(const std::string& typed) {
  std::string best = "quantize";
  std::size_t least = SIZE_MAX;
  for (const Verb& verb : kVerbs) {
    const std::size_t edits = distance(typed, verb.name);
    if (edits < least) {
      least = edits;
      best = verb.name;
    }
  }
  return best;
}

int fail(const Error& error) {
  std::fputs(error.three_lines().c_str(), stderr);
  return exit_code(error.kind());
}

// The verb among the arguments, for messages: the first that is one, else the first that is no
// option.
std::string typed_verb(const std::vector<std::string>& arguments) {
  for (const std::string& argument : arguments) {
    for (const Verb& verb : kVerbs) {
      if (argument == verb.name) {
        return argument;
      }
    }
  }
  for (const std::string& argument : arguments) {
    if (!argument.empty() && argument[0] != '-') {
      return argument;
    }
  }
  return "";
}

UsageError usage_error(const CLI::ParseError& error, const std::vector<std::string>& arguments) {
  const std::string verb = typed_verb(arguments);
  for (const Verb& known : kVerbs) {
    if (verb == known.name) {
      return {
          "the command line cannot be read",
          "quern " + verb,
          error.what(),
          "quern " + verb + " --help"};
    }
  }
  if (verb.empty()) {
    return {"no verb was given", "quern", error.what(), "quern --help"};
  }
  return {"unknown verb", verb, "quern --help lists the verbs", "quern " + nearest_verb(verb)};
}

int run(const std::vector<std::string>& arguments) {
  CLI::App app(
      "quern quantizes Qwen-family language models, proves what it cost, and runs the result.",
      "quern");
  app.set_version_flag("--version,-V", fmt::format("quern {} ({})", kVersion, kCommit));
  app.require_subcommand(1);
  app.fallthrough(false);
  GlobalOptions globals;
  std::vector<std::pair<CLI::App*, std::function<int(Session&)>>> actions;
  add_global_options(app, globals);
  for (const Verb& verb : kVerbs) {
    CLI::App* sub = app.add_subcommand(verb.name, verb.summary);
    auto action = verb.configure(*sub);
    add_global_options(*sub, globals);
    actions.emplace_back(sub, std::move(action));
  }
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());
  try {
    app.parse(reversed);
  } catch (const CLI::Success& success) {
    return app.exit(success);  // --help, --version
  } catch (const CLI::ParseError& error) {
    return fail(usage_error(error, arguments));
  }
  for (auto& [sub, action] : actions) {
    if (sub->parsed()) {
      Session session(globals, arguments);
      return action(session);
    }
  }
  return 2;
}

}  // namespace
}  // namespace quern

int main(int argc, char** argv) {
  // With a closed descriptor 1 or 2, the next file that is opened would get what is printed.
  int descriptor = 0;
  while (descriptor >= 0 && descriptor <= 2) {
    descriptor = ::open("/dev/null", O_RDWR);
  }
  ::close(descriptor);
  try {
    return quern::run({argv + 1, argv + argc});
  } catch (const quern::Error& error) {
    return quern::fail(error);
  } catch (const std::bad_alloc&) {
    return quern::fail(quern::ResourceError(
        "out of memory",
        "",
        "the system refused an allocation",
        "give --memory a smaller size, or use a machine with more"));
  } catch (const std::filesystem::filesystem_error& error) {
    return quern::fail(quern::IoError(
        "a file operation failed",
        error.path1().string(),
        error.code().message(),
        "check the path and its permissions",
        quern::ErrorKind::kFailed));
  } catch (const std::exception& error) {
    return quern::fail(quern::Error(
        quern::ErrorKind::kFailed,
        "an internal check failed",
        "",
        error.what(),
        "please report it with the command line"));
  }
}
