// SPDX-License-Identifier: Apache-2.0
#include "run_binary.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <sys/file.h>
#include <sys/mount.h>

#include <random>
#include <string>

// Runs that are killed, interrupted, repeated, or two at once: what is left is nothing or all.
namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::Child;
using testing::error_of;
using testing::Files;
using testing::run_quern;
using testing::RunResult;
using testing::ScratchDirectory;

using Words = std::vector<std::string>;

constexpr int kKills = 20;

class Killed : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_input_ids(root("ids.safetensors"), testing::some_ids(12, 64, 4096));
    place("whole");
    const RunResult result = run_quern(words_, {-1, 0, root("whole")});
    ASSERT_EQ(result.code, 0) << result.err;
    seconds_ = result.seconds;
    whole_ = testing::timeless_files(root("whole/out"));
  }
  [[nodiscard]] std::string root(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  // The command stands in the card, so every run has the same and a directory of its own.
  void place(const std::string& name) const { fs::create_directories(root(name)); }
  // Nothing, or the whole result.
  void expect_none_or_all(const fs::path& out) const {
    if (fs::exists(out)) {
      EXPECT_TRUE(testing::timeless_files(out) == whole_) << out;
      EXPECT_TRUE(fs::exists(out / "quantization_manifest.json"));
    }
  }

  ScratchDirectory scratch_;
  Words words_ = {
      "quantize",
      testing::bundled_model("tiny-llama3"),
      "-o",
      "out",
      "--calibration",
      "../ids.safetensors",
      "--sweeps",
      "2"};
  double seconds_ = 0;
  Files whole_;
};

TEST_F(Killed, OneRunAgainAndAgainEndsInTheSameBytes) {
  place("killed");
  std::mt19937 random(1);
  const fs::path out = root("killed/out");
  for (int i = 0; i < kKills; ++i) {
    const double share = static_cast<double>(random() % 1000) / 1000;
    const RunResult result = run_quern(words_, {0.6 * share * seconds_, SIGKILL, root("killed")});
    EXPECT_TRUE(result.signal == SIGKILL || result.code == 0) << result.err;
    expect_none_or_all(out);
  }
  const RunResult last = run_quern(words_, {-1, 0, root("killed")});
  ASSERT_EQ(last.code, 0) << last.err;
  EXPECT_TRUE(testing::timeless_files(out) == whole_);
  EXPECT_FALSE(fs::exists(root("killed/out.run")));
  EXPECT_FALSE(fs::exists(root("killed/out.partial")));
}

TEST_F(Killed, NoMomentLeavesSomethingHalf) {
  std::mt19937 random(2);
  for (int i = 0; i < kKills; ++i) {
    const std::string name = "at-" + std::to_string(i);
    place(name);
    // Spread over the whole run; the last ones fall into writing and renaming.
    const double share = (i + static_cast<double>(random() % 1000) / 1000) / kKills;
    const RunResult result = run_quern(words_, {share * seconds_, SIGKILL, root(name)});
    EXPECT_TRUE(result.signal == SIGKILL || result.code == 0) << result.err;
    expect_none_or_all(root(name + "/out"));
    if (i % 5 == 4) {
      const RunResult resumed = run_quern(words_, {-1, 0, root(name)});
      ASSERT_EQ(resumed.code, 0) << resumed.err;
      EXPECT_TRUE(testing::timeless_files(root(name + "/out")) == whole_) << share;
    }
    fs::remove_all(root(name));
  }
}

TEST_F(Killed, AnInterruptSaysHowToGoOn) {
  place("interrupted");
  RunResult result;
  for (double share = 0.7; share > 0.1 && result.code != 130; share -= 0.1) {
    result = run_quern(words_, {share * seconds_, SIGINT, root("interrupted")});
    if (result.code == 0) {
      fs::remove_all(root("interrupted/out"));
    }
  }
  ASSERT_EQ(result.code, 130) << result.err;
  EXPECT_NE(error_of(result).find("try: run the same command again"), std::string::npos);
  EXPECT_FALSE(fs::exists(root("interrupted/out")));
  const RunResult resumed = run_quern(words_, {-1, 0, root("interrupted")});
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_TRUE(testing::timeless_files(root("interrupted/out")) == whole_);
}

TEST_F(Killed, ATruncatedModelIsAnErrorAndNoCrash) {
  place("cut");
  fs::copy(testing::bundled_model("tiny-llama3"), root("model"), fs::copy_options::recursive);
  Words words = words_;
  words[1] = "../model";
  Child child(words, root("cut"));
  child.signal_at(0.5 * seconds_, 0);  // only waits
  fs::resize_file(root("model/model.safetensors"), 4096);
  const RunResult result = child.finish();
  EXPECT_EQ(result.signal, 0);
  if (result.code != 0) {
    EXPECT_EQ(result.code, 3) << result.err;
    EXPECT_FALSE(error_of(result).empty()) << result.err;
    EXPECT_FALSE(fs::exists(root("cut/out")));
  }
}

TEST_F(Killed, TwoAtOnceDoNotMix) {
  place("both");
  {
    Child first(words_, root("both"));
    Child second(words_, root("both"));
    const RunResult a = first.finish();
    const RunResult b = second.finish();
    EXPECT_TRUE(a.code == 0 || b.code == 0) << a.err << b.err;
    for (const RunResult* result : {&a, &b}) {
      if (result->code != 0) {
        EXPECT_EQ(result->code, 1) << result->err;
        EXPECT_NE(error_of(*result).find("another run is at work"), std::string::npos);
      }
    }
  }
  EXPECT_TRUE(testing::timeless_files(root("both/out")) == whole_);
}

// A fast model for what needs no long run: one layer, weights in two files, no tokenizer.
class Repeated : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_files(at("model"), testing::good_checkpoints().at(1).files);
    testing::write_input_ids(at("ids.safetensors"), testing::some_ids(4, 16, 64));
  }
  [[nodiscard]] std::string at(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  [[nodiscard]] RunResult quantize(const Words& more, const std::string& out = "out") const {
    Words words = {"quantize", at("model"), "-o", out, "--group-size", "32"};
    words.insert(words.end(), {"--calibration", at("ids.safetensors"), "--json"});
    words.insert(words.end(), more.begin(), more.end());
    return run_quern(words, {-1, 0, scratch_.path()});
  }
  // A work directory as a killed run leaves it.
  void leave_work(const Words& more) const {
    fs::create_directories(at("out.partial"));
    const int held = ::open(at("out.partial").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    ASSERT_EQ(::flock(held, LOCK_EX), 0);
    EXPECT_EQ(quantize(more).code, 1);  // stops after its state is made
    ::close(held);
    ASSERT_TRUE(fs::exists(at("out.run/state.json")));
  }

  ScratchDirectory scratch_;
};

TEST_F(Repeated, TheFinishedResultIsGivenAgain) {
  const RunResult first = quantize({});
  ASSERT_EQ(first.code, 0) << first.err;
  const RunResult again = quantize({});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(again.out, first.out);
  EXPECT_NE(again.err.find("already"), std::string::npos);
  const RunResult other = quantize({"--bits", "3"});
  EXPECT_EQ(other.code, 2);
  EXPECT_NE(error_of(other).find("the output is not empty"), std::string::npos);
  const RunResult forced = quantize({"--bits", "3", "--force"});
  EXPECT_EQ(forced.code, 0) << forced.err;
  EXPECT_TRUE(fs::exists(at("out.old-1/model.safetensors")));
  EXPECT_EQ(forced.json()["linears"][0]["bits"], 3);
  const RunResult twice = quantize({"--force"});
  EXPECT_EQ(twice.code, 0) << twice.err;
  EXPECT_TRUE(fs::exists(at("out.old-2/model.safetensors")));
}

TEST_F(Repeated, AnIncompleteOrForeignOutputIsNotGivenAsFinished) {
  ASSERT_EQ(quantize({}).code, 0);
  fs::resize_file(at("out/model.safetensors"), 1000);
  EXPECT_EQ(quantize({}).code, 2);
  fs::remove(at("out/model.safetensors"));
  EXPECT_EQ(quantize({}).code, 2);
  for (const char* manifest : {"", "garbage", "[]", "{}", R"({"fingerprint": 1})"}) {
    write_file(at("out/quantization_manifest.json"), manifest);
    const RunResult result = quantize({});
    EXPECT_EQ(result.code, 2) << manifest;
    EXPECT_FALSE(error_of(result).empty()) << result.err;
  }
}

TEST_F(Repeated, OtherOptionsInTheSameWorkDirectory) {
  leave_work({});
  const RunResult changed = quantize({"--bits", "3", "--seed", "7"});
  EXPECT_EQ(changed.code, 2);
  EXPECT_NE(error_of(changed).find("changed: options, plan, seed"), std::string::npos)
      << changed.err;
  EXPECT_EQ(quantize({"--bits", "3", "--seed", "7", "--no-resume"}).code, 0);
  EXPECT_FALSE(fs::exists(at("out.run")));
  EXPECT_FALSE(fs::exists(at("out.partial")));
}

TEST_F(Repeated, ABrokenStateOrBlockIsNotTrusted) {
  leave_work({});
  write_file(at("out.run/state.json"), "garbage");
  EXPECT_EQ(quantize({}).code, 2);
  fs::remove_all(at("out.run"));
  ASSERT_EQ(quantize({}).code, 0);
  const Files whole = testing::timeless_files(at("out"));
  fs::remove_all(at("out"));
  leave_work({});
  fs::create_directories(at("out.run/layers"));
  write_file(at("out.run/layers/0000.safetensors"), "garbage");
  ASSERT_EQ(quantize({}).code, 0);
  EXPECT_TRUE(testing::timeless_files(at("out")) == whole);
  // Blocks without a state could be of other options.
  fs::remove_all(at("out"));
  fs::create_directories(at("out.run/layers"));
  ASSERT_EQ(quantize({}).code, 0);
  EXPECT_TRUE(testing::timeless_files(at("out")) == whole);
}

TEST_F(Repeated, NothingOfOthersIsTaken) {
  fs::create_directories(at("home/documents"));
  write_file(at("home/letter.txt"), "dear");
  const Files home = testing::timeless_files(at("home"));
  const Files model = testing::timeless_files(at("model"));
  const auto refused = [&](const Words& more, const std::string& out) {
    const RunResult result = quantize(more, out);
    EXPECT_EQ(result.code, 2) << result.err;
    EXPECT_FALSE(error_of(result).empty()) << result.err;
    EXPECT_TRUE(testing::timeless_files(at("home")) == home);
    EXPECT_TRUE(testing::timeless_files(at("model")) == model);
  };
  refused({"--work-dir", "home"}, "out");
  refused({"--work-dir", "home", "--no-resume"}, "out");
  refused({"--work-dir", "model"}, "out");
  refused({"--work-dir", "."}, "out");
  refused({"--work-dir", "out"}, "out");
  refused({"--work-dir", "out/work"}, "out");
  refused({"--work-dir", "out.partial"}, "out");
  refused({}, "home");
  refused({}, "home/letter.txt");
  refused({}, "model");
  refused({"--force"}, "model");
  refused({"--force"}, ".");
  refused({"--force"}, "..");
  refused({}, "");
  refused({}, "/");
  fs::rename(at("home"), at("out.partial"));
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(quantize({}).code, 2);
    EXPECT_TRUE(testing::timeless_files(at("out.partial")) == home);
  }
}

TEST_F(Repeated, PlacesWithStrangeNames) {
  fs::create_directories(at("empty"));
  fs::create_directories(at("target"));
  fs::create_directories(at("a"));
  fs::create_directory_symlink("target", at("link"));
  for (const std::string& out :
       {std::string("plain"),
        std::string("slash/"),
        std::string("./a/../dots"),
        std::string("deep/er/still"),
        std::string("with space"),
        std::string("ünïcode 中文 \xf0\x9f\x90\xb4"),
        std::string("line\nend"),
        std::string("not-utf8-\xff\xfe"),
        std::string("empty"),
        std::string("link"),
        std::string("model/inside"),
        std::string("-dash")}) {
    const RunResult result = quantize({}, out.starts_with('-') ? "./" + out : out);
    ASSERT_EQ(result.code, 0) << out << "\n" << result.err;
    EXPECT_EQ(result.json()["linears"].size(), 7U);
    EXPECT_EQ(run_quern({"verify", at(out), "--against", at("model")}).code, 0) << out;
    EXPECT_EQ(quantize({}, out.starts_with('-') ? "./" + out : out).code, 0) << out;
  }
  EXPECT_TRUE(fs::is_symlink(at("link")));
  EXPECT_TRUE(fs::exists(at("target/config.json")));
  EXPECT_EQ(read_json(at("slash/quantization_manifest.json"))["output"], "slash");
}

TEST_F(Repeated, SourcesWithStrangeFiles) {
  fs::create_symlink("nowhere", at("model/dangling.safetensors"));
  fs::create_directories(at("model/folder.safetensors"));
  fs::create_symlink("/dev/zero", at("model/endless.json"));
  fs::rename(at("model/config.json"), at("elsewhere.json"));
  fs::create_symlink("../elsewhere.json", at("model/config.json"));
  const RunResult result = quantize({});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_FALSE(fs::exists(at("out/endless.json")));
}

TEST_F(Repeated, AFullDiskIsSaidAndGoneOnFrom) {
  fs::create_directories(at("small"));
  if (::mount("tmpfs", at("small").c_str(), "tmpfs", 0, "size=16k") != 0) {
    GTEST_SKIP() << "only root can make a small disk";
  }
  const RunResult full = quantize({}, "small/out");
  EXPECT_EQ(full.code, 4) << full.err;
  EXPECT_FALSE(error_of(full).empty()) << full.err;
  EXPECT_FALSE(fs::exists(at("small/out")));
  EXPECT_EQ(::mount("tmpfs", at("small").c_str(), "tmpfs", MS_REMOUNT, "size=44k"), 0);
  EXPECT_EQ(quantize({}, "small/out").code, 4);
  EXPECT_EQ(::mount("tmpfs", at("small").c_str(), "tmpfs", MS_REMOUNT, "size=4m"), 0);
  const RunResult result = quantize({}, "small/out");
  EXPECT_EQ(result.code, 0) << result.err;
  ::umount(at("small").c_str());
}

}  // namespace
}  // namespace quern
