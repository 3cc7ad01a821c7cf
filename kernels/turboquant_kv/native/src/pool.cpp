// See pool.h. Late risers never delay a call: it ends when the tasks are done, not when every thread has woken.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace tq {
namespace {

// About the time between the layers of a small model; a futex wake costs as much.
constexpr auto kSpin = std::chrono::microseconds(30);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int num_threads) : owner_(getpid()) {
        for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
            generation_++;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int num_threads() const { return int(threads_.size()) + 1; }
    bool is_mine() const { return owner_ == getpid(); }

    void run(int num_tasks, const std::function<void(int, int)>& fn) {
        std::lock_guard one_call(calls_);
        if (threads_.empty() || num_tasks < 2) {
            for (int task = 0; task < num_tasks; task++) fn(task, 0);
            return;
        }
        {
            std::lock_guard lock(mutex_);
            fn_ = &fn;
            num_tasks_ = num_tasks;
            next_ = 0;
            generation_++;
        }
        wake_.notify_all();
        take_tasks(fn, num_tasks, 0);
        std::unique_lock lock(mutex_);
        fn_ = nullptr; // nobody joins from here on
        const auto until = std::chrono::steady_clock::now() + kSpin;
        while (active_ > 0 && std::chrono::steady_clock::now() < until) {
            lock.unlock();
            relax();
            lock.lock();
        }
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    void take_tasks(const std::function<void(int, int)>& fn, int num_tasks, int worker) {
        for (int task; (task = next_.fetch_add(1)) < num_tasks;) fn(task, worker);
    }

    void work(int worker) {
        unsigned long seen = 0;
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + kSpin;
            while (generation_.load() == seen && std::chrono::steady_clock::now() < until)
                for (int i = 0; i < 16; i++) relax();
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return generation_.load() != seen; });
            seen = generation_;
            if (stopping_) return;
            if (fn_ == nullptr) continue;
            const auto& fn = *fn_;
            const int num_tasks = num_tasks_;
            active_++;
            lock.unlock();
            take_tasks(fn, num_tasks, worker);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    const pid_t owner_;
    std::vector<std::thread> threads_;
    std::mutex calls_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<unsigned long> generation_{0};
    std::atomic<int> next_{0};
    const std::function<void(int, int)>* fn_ = nullptr; // open for joining while not null
    int num_tasks_ = 0, active_ = 0;
    bool stopping_ = false;
};

std::mutex g_mutex;
int g_num_threads = 1;
// Held by pointer and never destroyed: at exit its threads may be anywhere, and after a fork they are gone.
std::shared_ptr<Pool>* g_pool = nullptr;

std::shared_ptr<Pool> pool() {
    std::lock_guard lock(g_mutex);
    if (g_pool != nullptr && !(*g_pool)->is_mine()) g_pool = nullptr;
    if (g_pool == nullptr) g_pool = new std::shared_ptr<Pool>(std::make_shared<Pool>(g_num_threads));
    if ((*g_pool)->num_threads() != g_num_threads) *g_pool = std::make_shared<Pool>(g_num_threads); // a running call keeps the old one
    return *g_pool;
}

} // namespace

void set_num_threads(int num_threads) {
    std::lock_guard lock(g_mutex);
    g_num_threads = num_threads < 1 ? 1 : num_threads > kMaxThreads ? kMaxThreads : num_threads;
}

int num_threads() {
    std::lock_guard lock(g_mutex);
    return g_num_threads;
}

void run_tasks(int num_tasks, const std::function<void(int, int)>& fn) { pool()->run(num_tasks, fn); }

} // namespace tq
