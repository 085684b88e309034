// The time of each part of a step. Off, it costs one comparison per part.
#pragma once

#include <chrono>

namespace baton {

enum Part { EMBED, ROUND, QKV_PRODUCT, ROTATE, ATTEND, OUTPUT_PRODUCT, GATE_UP_PRODUCT, DOWN_PRODUCT, HEAD_PRODUCT, PARTS };

struct Profile {
  bool on = false;
  double seconds[PARTS] = {};
};

// Adds the time until its end to a part.
class Timer {
 public:
  Timer(Profile& profile, Part part) : profile_(profile), part_(part) {
    if (profile_.on) start_ = Clock::now();
  }
  ~Timer() {
    if (profile_.on) profile_.seconds[part_] += std::chrono::duration<double>(Clock::now() - start_).count();
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  Profile& profile_;
  Part part_;
  Clock::time_point start_;
};

}  // namespace baton
