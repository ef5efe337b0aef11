// torch_parallel_for with threads that ThreadSanitizer sees begin and end. Those of torch are libgomp's, which is not
// compiled for it: what orders them would be unknown, and every access after a loop would look like a race with it.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <exception>
#include <latch>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// One loop: the range is split among threads as at::parallel_for splits it.
class Loop {
 public:
  Loop(int64_t begin, int64_t end, int64_t threads, ParallelFunc body, void* context)
      : begin_(begin), end_(end), share_(divide_up(end - begin, threads)), body_(body), context_(context) {}

  static int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

  // What the first piece that failed has thrown, if any.
  std::exception_ptr run() {
    const int64_t pieces = divide_up(end_ - begin_, share_);
    std::latch start(pieces);
    std::vector<std::thread> threads;
    for (int64_t piece = 1; piece < pieces; ++piece) threads.emplace_back([&, piece] { run(piece, start); });
    run(0, start);
    for (std::thread& thread : threads) thread.join();
    return failure_;
  }

 private:
  // All pieces begin together: otherwise the first would often be done before there is a second thread.
  void run(int64_t piece, std::latch& start) {
    start.arrive_and_wait();
    try {
      const int64_t begin = begin_ + piece * share_;
      body_(begin, std::min(begin + share_, end_), context_);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  int64_t begin_, end_, share_;
  ParallelFunc body_;
  void* context_;
  std::mutex mutex_;
  std::exception_ptr failure_;
};

void rethrow(int64_t, int64_t, void* failure) {
  std::rethrow_exception(*static_cast<std::exception_ptr*>(failure));
}

}  // namespace

// The linker sends all calls of the function without __wrap_ here (--wrap).
extern "C" {

AOTITorchError __real_torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body, void* context);

AOTITorchError __wrap_torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body, void* context) {
  uint32_t limit = 1;
  if (const AOTITorchError error = torch_get_num_threads(&limit)) return error;
  const int64_t threads = std::min<int64_t>(limit, Loop::divide_up(end - begin, std::max<int64_t>(grain, 1)));
  if (threads < 2) return __real_torch_parallel_for(begin, end, grain, body, context);
  std::exception_ptr failure = Loop(begin, end, threads, body, context).run();
  // torch makes an error of what is thrown in a loop of its own.
  return failure ? __real_torch_parallel_for(0, 1, 1, rethrow, &failure) : AOTI_TORCH_SUCCESS;
}

}  // extern "C"
