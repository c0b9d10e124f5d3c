// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/log.h"

#include <cstdint>
#include <string>

namespace quern {

// The progress line: what is being done, share of the work done, time to go. Work is counted in
// multiply-adds, so that layers of different size are not taken for equals.
class Progress {
 public:
  Progress(Log& log, double total_work) : log_(log), total_(total_work) {}

  // What the line begins with: "layer 17/28  mlp_input".
  void set_stage(std::string stage);
  // Work done since the last call; redraws at most ten times a second.
  void add(double work);
  // Work that turned out not to be needed (a resumed block).
  void skip(double work) { total_ -= work; }
  void finish();

 private:
  void draw(bool now);

  Log& log_;
  double total_;
  double done_ = 0;
  double started_ = 0;
  double last_drawn_ = 0;
  std::string stage_;
};

}  // namespace quern
