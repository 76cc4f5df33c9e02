// Threads for work that lasts microseconds.
//
// One call of `run` is one parallel region: every thread runs the same function, the caller being thread 0, and steps that need each
// other's results are separated by `Worker::barrier`, which spins. A whole step of a model is one region. Between regions the workers
// spin for about a millisecond, so that the next token finds them awake, and then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace criadero {

class Pool;

// Some 200 us. Who waits for longer is likely to hold the very core that the other thread needs: with another program at work two threads
// of ours end on one core, and every barrier then costs as long as we spin. So patience falls to a microsecond at once and comes back slowly.
constexpr int PATIENCE = 20000, IMPATIENCE = 100;

// What a thread inside a region knows.
struct Worker {
    Pool& pool;
    int index;  // 0 is the caller
    int count;
    int patience = PATIENCE;  // turns of waiting before it lets others have the core

    // Waits until every thread is here. What was written before it is seen by all after it.
    void barrier();
    // The next number, from 0, that no other thread has been given since the last barrier (or the region's start): for sharing out
    // pieces of work. Between two barriers there is one such sequence.
    int next();
    // This thread's part [first, last) of n pieces, when all are of the same size.
    int first(int n) const { return static_cast<int>(static_cast<int64_t>(n) * index / count); }
    int last(int n) const { return static_cast<int>(static_cast<int64_t>(n) * (index + 1) / count); }
};

class Pool {
   public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return count_; }

    // fn(Worker&) on every thread; returns when all have finished. fn must not throw (the others would wait for ever at the next barrier,
    // so it ends the process). Callers from several threads take turns. Never call it from inside a region of the same pool.
    template <class F>
    void run(F&& fn) {
        run_raw([](void* f, Worker& w) noexcept { (*static_cast<std::remove_reference_t<F>*>(f))(w); }, &fn);
    }

   private:
    friend struct Worker;
    using Call = void (*)(void*, Worker&) noexcept;
    void run_raw(Call call, void* argument);
    void start();
    void work(int index, uint64_t seen);

    int count_;
    unsigned forks_ = 0;  // the process's fork count when the threads were made
    std::vector<std::thread>* workers_ = nullptr;
    std::mutex turn_;  // one region at a time
    int patience_ = PATIENCE;  // the caller's, from region to region

    Call call_ = nullptr;
    void* argument_ = nullptr;
    std::mutex sleep_;
    std::condition_variable wake_;
    alignas(64) std::atomic<uint64_t> epoch_{0};  // one more for each region
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint64_t> phase_{0};  // one more for each barrier passed
    alignas(64) std::atomic<int> ticket_{0};
};

// The process's pool of this many threads, made at first use and kept.
Pool& shared_pool(int threads);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline void Worker::barrier() {
    if (count == 1) {
        pool.ticket_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint64_t phase = pool.phase_.load(std::memory_order_relaxed);
    if (pool.arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        pool.arrived_.store(0, std::memory_order_relaxed);
        pool.ticket_.store(0, std::memory_order_relaxed);
        pool.phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    int spins = 0;
    for (; pool.phase_.load(std::memory_order_acquire) == phase; ++spins) {
        if (spins < patience) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
    patience = spins > patience ? IMPATIENCE : patience + patience / 8 < PATIENCE ? patience + patience / 8 : PATIENCE;
}

inline int Worker::next() { return pool.ticket_.fetch_add(1, std::memory_order_relaxed); }

}  // namespace criadero
