// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/thread_pool.h"
#include "image/image.h"

namespace quern {

// Bicubic (Keys, a = -0.5), widened to the step when it makes the picture smaller (antialias), as
// torch's interpolate does it on bytes: columns first, weights in 16-bit fixed point, rounded to
// bytes after each direction. Same result for any thread count.
[[nodiscard]] Image resize_bicubic(
    ThreadPool& pool, const Image& image, std::int64_t width, std::int64_t height);

}  // namespace quern
