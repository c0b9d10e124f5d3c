// SPDX-License-Identifier: Apache-2.0
#include "pipeline/progress.h"

#include "base/process.h"
#include "base/units.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace quern {

void Progress::set_stage(std::string stage) {
  if (started_ == 0) {
    started_ = steady_seconds();
  }
  stage_ = std::move(stage);
  draw(false);
}

void Progress::add(double work) {
  if (started_ == 0) {
    started_ = steady_seconds();
  }
  done_ += work;
  draw(false);
}

void Progress::draw(bool now) {
  const double time = steady_seconds();
  if (!now && time - last_drawn_ < 0.1) {
    return;
  }
  last_drawn_ = time;
  const double share = total_ > 0 ? std::clamp(done_ / total_, 0.0, 1.0) : 0.0;
  const double elapsed = time - started_;
  const std::string eta =
      share > 0.005 && elapsed > 1 ? human_duration(elapsed / share - elapsed) : "…";
  log_.progress(fmt::format(
      "{}  {:.0f} %  {}  elapsed {}  eta {}",
      stage_,
      100 * share,
      human_bytes(static_cast<double>(process_usage().anonymous_bytes)),
      human_duration(elapsed),
      eta));
}

void Progress::finish() {
  log_.progress("");
}

}  // namespace quern
