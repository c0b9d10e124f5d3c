// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"
#include "base/json.h"
#include "forged.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// The program as a person runs it: its exit code, what it printed, and what it left on disk.
namespace quern::testing {

struct RunResult {
  int code = -1;  // exit code; -1 when a signal ended it
  int signal = 0;
  std::string out;
  std::string err;
  double seconds = 0;

  [[nodiscard]] Json json() const { return parse_json(out, "stdout"); }
};

struct RunOptions {
  double signal_after = -1;  // seconds; negative: let it run
  int signal = SIGKILL;
  std::filesystem::path directory;  // where it runs; empty: here
};

inline double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline std::string read_descriptor(int descriptor) {
  std::string text;
  char buffer[4096];
  ::lseek(descriptor, 0, SEEK_SET);
  for (ssize_t n = 0; (n = ::read(descriptor, buffer, sizeof(buffer))) > 0;) {
    text.append(buffer, static_cast<std::size_t>(n));
  }
  return text;
}

class Child {
 public:
  Child(const std::vector<std::string>& arguments, const std::filesystem::path& directory)
      : started_(now_seconds()) {
    std::vector<std::string> words = {QUERN_BINARY};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& word : words) {
      argv.push_back(word.data());
    }
    argv.push_back(nullptr);
    const std::string temporary = std::filesystem::temp_directory_path().string();
    out_ = ::open(temporary.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    err_ = ::open(temporary.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    process_ = ::fork();
    if (process_ < 0 || out_ < 0 || err_ < 0) {
      throw std::runtime_error("cannot start the program");
    }
    if (process_ == 0) {
      ::dup2(out_, STDOUT_FILENO);
      ::dup2(err_, STDERR_FILENO);
      if (directory.empty() || ::chdir(directory.c_str()) == 0) {
        ::execv(QUERN_BINARY, argv.data());
      }
      ::_exit(127);
    }
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() {
    if (!ended_) {
      ::kill(process_, SIGKILL);
      (void)finish();
    }
    ::close(out_);
    ::close(err_);
  }

  // Sends `signal` at `seconds` after the start, unless it has ended by then.
  void signal_at(double seconds, int signal) {
    while (!ended_ && now_seconds() - started_ < seconds) {
      ended_ = ::waitpid(process_, &status_, WNOHANG) == process_;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!ended_) {
      ::kill(process_, signal);
    }
  }

  RunResult finish() {
    while (!ended_) {
      ended_ = ::waitpid(process_, &status_, 0) == process_;
    }
    RunResult result;
    result.seconds = now_seconds() - started_;
    result.code = WIFEXITED(status_) ? WEXITSTATUS(status_) : -1;
    result.signal = WIFSIGNALED(status_) ? WTERMSIG(status_) : 0;
    result.out = read_descriptor(out_);
    result.err = read_descriptor(err_);
    return result;
  }

 private:
  double started_;
  pid_t process_ = -1;
  int out_ = -1;
  int err_ = -1;
  int status_ = 0;
  bool ended_ = false;
};

inline RunResult run_quern(
    const std::vector<std::string>& arguments, const RunOptions& options = {}) {
  Child child(arguments, options.directory);
  if (options.signal_after >= 0) {
    child.signal_at(options.signal_after, options.signal);
  }
  return child.finish();
}

// The last three lines of stderr if they are an error as the contract wants it, else nothing.
inline std::string error_of(const RunResult& result) {
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < result.err.size();) {
    const std::size_t end = std::min(result.err.find('\n', at), result.err.size());
    lines.push_back(result.err.substr(at, end - at));
    at = end + 1;
  }
  const std::size_t n = lines.size();
  const bool good = n >= 3 && lines[n - 3].starts_with("error: ") &&
                    lines[n - 2].starts_with("reason: ") && lines[n - 1].starts_with("try: ");
  return good ? lines[n - 3] + "\n" + lines[n - 2] + "\n" + lines[n - 1] + "\n" : "";
}

inline std::string bundled_model(const std::string& name) {
  return std::string(QUERN_TESTDATA) + "/models/" + name;
}

inline std::string calibration_ids() {
  return bundled_model("calibration-128x512.safetensors");
}

// A safetensors file with `input_ids` of these rows.
inline void write_input_ids(
    const std::filesystem::path& path, const std::vector<std::vector<std::int64_t>>& rows) {
  std::string bytes;
  for (const auto& row : rows) {
    bytes.append(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(std::int64_t));
  }
  ForgedFile file;
  file.metadata.clear();
  const auto length = rows.empty() ? std::int64_t{0} : static_cast<std::int64_t>(rows[0].size());
  file.add("input_ids", "I64", {static_cast<std::int64_t>(rows.size()), length}, bytes);
  write_file(path, put_together(file));
}

inline std::vector<std::vector<std::int64_t>> some_ids(
    std::int64_t rows, std::int64_t length, std::int64_t vocabulary) {
  std::vector<std::vector<std::int64_t>> ids;
  std::uint64_t state = 1;
  for (std::int64_t r = 0; r < rows; ++r) {
    auto& row = ids.emplace_back();
    for (std::int64_t i = 0; i < length; ++i) {
      state = state * 6364136223846793005U + 1442695040888963407U;
      row.push_back(
          static_cast<std::int64_t>((state >> 33U) % static_cast<std::uint64_t>(vocabulary)));
    }
  }
  return ids;
}

// Relative path -> bytes of all regular files, those that hold times left out.
inline Files timeless_files(const std::filesystem::path& directory) {
  Files files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
    const std::string name = std::filesystem::relative(entry.path(), directory).string();
    if (entry.is_regular_file() && name != "quantization_manifest.json") {
      files[name] = read_file(entry.path());
    }
  }
  return files;
}

}  // namespace quern::testing
