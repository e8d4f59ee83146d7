// A thread pool for jobs of some microseconds to milliseconds.
//
// A job is cut into pieces that threads take one by one, so that a thread which another process
// holds up costs the piece it has, and one that has none costs nothing: the caller does not wait
// for it. (An OpenMP region ends when all its threads have arrived.) Workers look for work for
// some 20 us after a job and then sleep. A worker that finds itself on the caller's processor moves
// away from it: each would hold up the other for whole time slices.

#pragma once

#include <atomic>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

#include "common.h"

namespace qwen2vl {

constexpr int kPauses = 32;     // of 40 to 140 cycles each, between two looks
constexpr int kLooks = 12;      // for work, before a worker sleeps
constexpr int kMaxLooks = 500;  // for the end of a job, before the caller sleeps

void pause() {
#if X86
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Waits about a microsecond, and lets another thread that shares this processor run.
void wait_shortly() {
    for (int i = 0; i < kPauses; i++) pause();
    std::this_thread::yield();
}

int current_processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// Excludes a processor from those of the calling thread, unless it is the only one of the process.
void leave_processor([[maybe_unused]] int processor) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(getpid(), sizeof allowed, &allowed) != 0) return;
    CPU_CLR(processor, &allowed);
    if (CPU_COUNT(&allowed) > 0) sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

struct Job {
    void (*run)(const void* context, int64_t piece);
    const void* context;
};

class ThreadPool {
  public:
    // Runs pieces 0 to `pieces` - 1 on up to `threads` threads, the caller one of them. A second
    // caller at the same time computes alone.
    void run(int64_t pieces, int threads, const Job& job) {
        if (threads > 1 && pieces > 1 && pieces <= kMaxPieces && busy_.try_lock()) {
            start_workers(threads - 1);
            share(pieces, threads - 1, job);
            busy_.unlock();
        } else {
            for (int64_t piece = 0; piece < pieces; piece++) job.run(job.context, piece);
        }
    }

    // In the child of a fork there are no workers, and nobody holds the lock.
    void reset_after_fork() {
        new (this) ThreadPool();
    }

  private:
    static constexpr int64_t kMaxPieces = 1 << 20;
    // claim_: 22 bits number of the job | 21 bits pieces | 21 bits next piece. A claim is one
    // addition, and tells by itself whether its piece exists, whichever job it fell into.
    static constexpr int kBits = 21;
    static constexpr uint64_t kMask = (uint64_t(1) << kBits) - 1;

    static bool has_piece(uint64_t claim) { return (claim & kMask) < (claim >> kBits & kMask); }

    void start_workers(int count) {
        for (; num_workers_ < count; num_workers_++)
            std::thread([this, id = num_workers_] { work(id); }).detach();
    }

    void share(int64_t pieces, int workers, const Job& job) {
        job_ = job;
        finished_.store(0, std::memory_order_relaxed);
        workers_wanted_.store(workers, std::memory_order_relaxed);
        caller_processor_.store(current_processor(), std::memory_order_relaxed);
        claim_.store(++number_ << 2 * kBits | uint64_t(pieces) << kBits);
        if (sleepers_.load() > 0) {
            wake_.fetch_add(1);
            wake_.notify_all();
        }
        while (take_piece()) {
        }
        for (int looks = 0; finished_.load() < pieces; looks++) {
            if (looks < kMaxLooks) {
                wait_shortly();
                continue;
            }
            is_waiting_.store(1);
            int32_t seen = finished_.load();
            if (seen < pieces) finished_.wait(seen);
            is_waiting_.store(0);
        }
    }

    bool take_piece() {
        if (!has_piece(claim_.load(std::memory_order_relaxed))) return false;
        uint64_t claim = claim_.fetch_add(1);
        if (!has_piece(claim)) return false;
        // The job cannot end before this piece is finished, so job_ is of this claim.
        job_.run(job_.context, int64_t(claim & kMask));
        finished_.fetch_add(1);
        if (is_waiting_.load()) finished_.notify_one();
        return true;
    }

    void work(int id) {
        for (;;) {
            for (int looks = 0; looks < kLooks && !can_work(id); looks++) wait_shortly();
            if (can_work(id)) {
                int processor = caller_processor_.load(std::memory_order_relaxed);
                if (processor >= 0 && processor == current_processor()) leave_processor(processor);
                while (take_piece()) {
                }
                continue;
            }
            int32_t seen = wake_.load();
            sleepers_.fetch_add(1);
            if (!can_work(id)) wake_.wait(seen);
            sleepers_.fetch_sub(1);
        }
    }

    bool can_work(int id) {
        return has_piece(claim_.load()) && id < workers_wanted_.load(std::memory_order_relaxed);
    }

    std::mutex busy_;
    Job job_{};
    int num_workers_ = 0;
    uint64_t number_ = 0;
    alignas(64) std::atomic<uint64_t> claim_{0};
    alignas(64) std::atomic<int32_t> finished_{0};
    std::atomic<int32_t> is_waiting_{0};
    alignas(64) std::atomic<int32_t> wake_{0};
    std::atomic<int32_t> sleepers_{0};
    std::atomic<int32_t> workers_wanted_{0};
    std::atomic<int32_t> caller_processor_{-1};
};

ThreadPool& pool() {
    // Never destroyed: workers sleep in it until the process ends.
    static ThreadPool* instance = [] {
        auto* created = new ThreadPool();
#if defined(__linux__)
        static ThreadPool* forked = created;
        pthread_atfork(nullptr, nullptr, [] { forked->reset_after_fork(); });
#endif
        return created;
    }();
    return *instance;
}

template <class F>
void parallel_for(int64_t pieces, int threads, const F& body) {
    Job job{[](const void* f, int64_t piece) { (*static_cast<const F*>(f))(piece); }, &body};
    pool().run(pieces, threads, job);
}

}  // namespace qwen2vl
