// A small persistent thread pool: static split, spin briefly, then sleep. No OpenMP: its runtime
// would clash with torch's copy, and its barriers cost more than a small layer.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "vqkernels.h"

namespace vq {

// Part `index` of `count`; must not throw.
using PartFn = void (*)(void *context, std::int32_t index, std::int32_t count);

}  // namespace vq

struct vq_pool {
 public:
  explicit vq_pool(std::int32_t num_threads);
  ~vq_pool();
  vq_pool(const vq_pool &) = delete;
  vq_pool &operator=(const vq_pool &) = delete;

  std::int32_t num_threads() const { return static_cast<std::int32_t>(workers_.size()) + 1; }

  // False in a child process of the one that made the pool: only the forking thread lives there.
  bool owned_by_this_process() const;

  // Runs every part, part 0 on the calling thread, and returns when all are done. Calls from
  // several threads take turns.
  void run(vq::PartFn part, void *context);

 private:
  void work(std::int32_t index);
  void wait_for_job(std::uint32_t seen);
  void publish();
  void stop();

  std::mutex run_mutex_;
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<std::int32_t> sleepers_{0};
  std::atomic<std::int32_t> remaining_{0};
  bool stopping_ = false;  // written before, read after a change of generation_
  vq::PartFn part_ = nullptr;
  void *context_ = nullptr;
  std::int64_t process_ = 0;
  std::vector<std::thread> workers_;
};
