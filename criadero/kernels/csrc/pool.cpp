#include "pool.h"

#include <pthread.h>

#include <chrono>
#include <map>
#include <memory>
#include <new>

namespace criadero {

namespace {

// A child made by fork() has none of our threads: pools see by this count that they have to make theirs again.
std::atomic<unsigned> forks{0};
const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

}  // namespace

Pool::Pool(int threads) : count_(threads < 1 ? 1 : threads) { (void)registered; }

void Pool::start() {
    // After a fork the old handles belong to the parent: they are left alone, neither joined nor destroyed.
    workers_ = new std::vector<std::thread>();
    forks_ = forks.load();
    new (&sleep_) std::mutex;  // a worker of the parent may have held them
    new (&wake_) std::condition_variable;
    sleepers_.store(0);
    arrived_.store(0);
    const uint64_t now = epoch_.load();
    for (int i = 1; i < count_; ++i) workers_->emplace_back([this, i, now] { work(i, now); });
}

Pool::~Pool() {
    if (!workers_ || forks_ != forks.load()) return;
    {
        std::lock_guard<std::mutex> lock(sleep_);
        stop_.store(true);
        epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& one : *workers_) one.join();
    delete workers_;
}

void Pool::run_raw(Call call, void* argument) {
    std::lock_guard<std::mutex> turn(turn_);
    Worker self{*this, 0, count_};
    ticket_.store(0, std::memory_order_relaxed);
    if (count_ == 1) {
        call(argument, self);
        return;
    }
    if (!workers_ || forks_ != forks.load(std::memory_order_relaxed)) start();
    call_ = call;
    argument_ = argument;
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> lock(sleep_); }  // a worker between its last look and its sleep holds this
        wake_.notify_all();
    }
    self.patience = patience_;
    call(argument, self);
    self.barrier();  // everybody has finished
    patience_ = self.patience;
}

void Pool::work(int index, uint64_t seen) {
    using clock = std::chrono::steady_clock;
    Worker self{*this, index, count_};
    for (;;) {
        const auto began = clock::now();
        for (int spins = 1; epoch_.load(std::memory_order_acquire) == seen; ++spins) {
            relax();
            if (spins % 512) continue;
            if (clock::now() - began < std::chrono::milliseconds(1)) {
                std::this_thread::yield();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep_);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
        ++seen;  // the caller starts no other region before we have passed its last barrier
        if (stop_.load()) return;
        call_(argument_, self);
        self.barrier();
    }
}

Pool& shared_pool(int threads) {
    static std::mutex mutex;
    // Never destroyed: at exit the interpreter may already have ended the threads.
    static auto* pools = new std::map<int, std::unique_ptr<Pool>>();
    std::lock_guard<std::mutex> lock(mutex);
    auto& pool = (*pools)[threads < 1 ? 1 : threads];
    if (!pool) pool = std::make_unique<Pool>(threads);
    return *pool;
}

}  // namespace criadero
