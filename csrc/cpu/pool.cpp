// Hand-over by a generation counter: a job is published by raising it, finished when every worker
// has counted `remaining_` down. Sequentially consistent order between `generation_` and
// `sleepers_` makes a lost wake-up impossible: either the publisher sees the sleeper, or the
// sleeper the job.
#include "pool.hpp"

#include <new>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <emmintrin.h>
#endif

namespace {

// About 0.2-0.5 ms of spinning: longer than a caller samples and prepares between two decode steps
// (a sleeping worker is 50 us late), short enough not to burn a core between two requests.
constexpr int kSpins = 12000;
// The caller waits for its workers that long before it offers them its core.
constexpr int kSpinsBeforeYield = 1000;

std::int64_t process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<std::int64_t>(getpid());
#else
  return 0;
#endif
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
}

}  // namespace

vq_pool::vq_pool(std::int32_t num_threads) : process_(process_id()) {
  try {
    workers_.reserve(static_cast<std::size_t>(num_threads - 1));
    for (std::int32_t index = 1; index < num_threads; ++index) {
      workers_.emplace_back(&vq_pool::work, this, index);
    }
  } catch (...) {
    stop();
    throw;
  }
}

vq_pool::~vq_pool() {
  if (owned_by_this_process()) {
    stop();
    return;
  }
  for (std::thread &worker : workers_) {
    worker.detach();  // forked child: there is no such thread to join
  }
}

bool vq_pool::owned_by_this_process() const {
  return process_ == process_id();
}

void vq_pool::stop() {
  stopping_ = true;
  publish();
  for (std::thread &worker : workers_) {
    worker.join();
  }
  workers_.clear();
}

void vq_pool::publish() {
  generation_.fetch_add(1);
  if (sleepers_.load() > 0) {
    const std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
}

void vq_pool::wait_for_job(std::uint32_t seen) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (generation_.load(std::memory_order_acquire) != seen) {
      return;
    }
    relax();
  }
  std::unique_lock<std::mutex> lock(sleep_mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, [&] { return generation_.load() != seen; });
  sleepers_.fetch_sub(1);
}

void vq_pool::work(std::int32_t index) {
  std::uint32_t seen = 0;
  for (;;) {
    wait_for_job(seen);
    ++seen;
    if (stopping_) {
      return;
    }
    part_(context_, index, num_threads());
    remaining_.fetch_sub(1, std::memory_order_release);
  }
}

void vq_pool::run(vq::PartFn part, void *context) {
  const std::lock_guard<std::mutex> turn(run_mutex_);
  part_ = part;
  context_ = context;
  remaining_.store(num_threads() - 1, std::memory_order_relaxed);
  publish();
  part(context, 0, num_threads());
  for (int spin = 0; remaining_.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpinsBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();  // more threads than free cores: let the worker in
    }
  }
}

std::int32_t vq_pool_create(std::int32_t num_threads, vq_pool **pool) {
  if (pool == nullptr) {
    return VQ_ERR_NULL;
  }
  *pool = nullptr;
  if (num_threads < 1 || num_threads > VQ_MAX_THREADS) {
    return VQ_ERR_SHAPE;
  }
  try {
    *pool = new vq_pool(num_threads);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  } catch (const std::system_error &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

void vq_pool_free(vq_pool *pool) {
  delete pool;
}
