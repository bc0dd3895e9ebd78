// zstd.cu as plain C++, for machines without a GPU.
//
// As a shared library: `run`, for driver.c. The threads of a launch run one after the other. Kernels
// whose threads wait for each other work with any number of them, and get one.
//
// With -DFUZZ: a program that decodes the cases on its standard input, every memory in an allocation of
// exact size, for the sanitizers. Launches have many shapes, and threads that wait for each other are
// threads here, too.
#include <cstdint>
#include <cstring>

#ifdef FUZZ
#include <pthread.h>

static pthread_barrier_t* barrier;  // of the threads of the CTA that runs, if it has several
static void __syncthreads()
{
    if (barrier) pthread_barrier_wait(barrier);
}
#else
static void __syncthreads() {}
#endif

#define __device__
#define __constant__
#define __global__
#define __shared__ static  // the blocks of a launch run one after the other
struct Index { unsigned x, y; };
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;
static int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }
static unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift)
{
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
template <class T> static T __ldg(const T* at) { return *at; }

#include "../../jaxgds/engines/zstd.cu"

typedef void Kernel(Workspace*, const Order*);

#ifndef FUZZ
static const struct {
    const char* name;
    Kernel* run;
    bool together;
} KERNELS[] = {
    {"zstd_walk", zstd_walk, true},          {"zstd_parse", zstd_parse, false},
    {"zstd_link", zstd_link, false},         {"zstd_sequences", zstd_sequences, false},
    {"zstd_place", zstd_place, false},       {"zstd_literals", zstd_literals, true},
    {"zstd_scatter", zstd_scatter, true},    {"zstd_execute", zstd_execute, true},
};

// Carries out a launch; arguments: where the workspaces and the orders are.
extern "C" void run(const char* name, unsigned blocks, unsigned lanes, unsigned threads, const uint64_t* arguments)
{
    for (const auto& kernel : KERNELS) {
        if (strcmp(kernel.name, name)) continue;
        gridDim = {blocks, lanes};
        blockDim = {kernel.together ? 1 : threads, 1};
        for (blockIdx.y = 0; blockIdx.y < lanes; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
                for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                    kernel.run((Workspace*)arguments[0], (const Order*)arguments[1]);
    }
}
#else
#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#endif

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#ifndef BEHIND
#define BEHIND 0
#endif
static const u32 behind = BEHIND;  // bytes behind the output, where no sanitizer sees that they stay

struct Launch {
    unsigned lanes;
    bool reversed;  // the last thread first
    bool two;       // kernels whose threads do not wait for each other, too, run by two threads
    Workspace* workspaces;
    const Order* orders;

    void one_thread(Kernel* kernel, unsigned blocks, unsigned threads, unsigned index) const
    {
        gridDim = {blocks, lanes};
        blockDim = {threads, 1};
        threadIdx = {index % threads, 0};
        blockIdx = {index / threads % blocks, index / threads / blocks};
        kernel(workspaces, orders);
    }

    // The threads one after the other, each from beginning to end
    void each(Kernel* kernel, unsigned blocks, unsigned threads, bool may_be_two = true) const
    {
        const unsigned total = blocks * lanes * threads, step = two && may_be_two ? 2 : 1;
        auto run = [=](unsigned first) {
            for (unsigned i = first; i < total; i += step)
                one_thread(kernel, blocks, threads, reversed ? total - 1 - i : i);
        };
        if (step == 1) return run(0);
        std::thread other(run, 1u);
        run(0);
        other.join();
    }

    // One CTA after the other, the threads of each at the same time
    void together(Kernel* kernel, unsigned blocks, unsigned threads) const
    {
        if (threads == 1) return each(kernel, blocks, 1, false);
        pthread_barrier_t of_the_threads;
        pthread_barrier_init(&of_the_threads, nullptr, threads);
        barrier = &of_the_threads;
        for (unsigned i = 0; i < blocks * lanes; i++) {
            std::vector<std::thread> running;
            for (unsigned j = 0; j < threads; j++)
                running.emplace_back([=] { one_thread(kernel, blocks, threads, i * threads + j); });
            for (std::thread& thread : running) thread.join();
        }
        barrier = nullptr;
        pthread_barrier_destroy(&of_the_threads);
    }
};

// One piece. Bits of `shape`: 0-1 blocks, 2-3 threads, 4 reversed, 5 two threads at a time, 6-9 threads
// that wait for each other; 11 and 12 are for main().
static void decode_piece(Workspace* workspaces, const Order* orders, unsigned lanes, u32 shape)
{
    static const unsigned counts_of_blocks[] = {1, 3, 8, 40}, counts_of_threads[] = {1, 4, 7, 32};
    const unsigned blocks = counts_of_blocks[shape & 3], threads = counts_of_threads[shape >> 2 & 3];
    const unsigned waiting = 1 + (shape >> 6 & 15);
    const Launch launch = {lanes, (shape >> 4 & 1) != 0, (shape >> 5 & 1) != 0, workspaces, orders};
    launch.together(zstd_walk, 2, waiting);
    launch.each(zstd_parse, blocks, threads);
    launch.each(zstd_link, 1, threads);
    launch.each(zstd_sequences, blocks, threads);
    launch.each(zstd_place, 1, threads);
    launch.together(zstd_literals, blocks, waiting);
    launch.together(zstd_scatter, blocks, waiting);
    launch.together(zstd_execute, 2, waiting);
}

static bool get(void* to, size_t size) { return fread(to, 1, size, stdin) == size; }

static void require(bool condition, const char* what)
{
    if (condition) return;
    fprintf(stderr, "zstd_emulated: %s\n", what);
    abort();
}

struct Case {
    u32 size;          // of the frame
    u32 capacity;
    u32 pieces;
    u32 shape;         // bit 11: there is a lane with nothing to do, bit 12: it is the first
    u32 out_offset;    // from an aligned address
    u32 piece_offset;
};

static void decode(const Case& c, const std::vector<u8>& frame, const std::vector<u32>& cuts, u32 number)
{
    // Workspaces with nothing around them that could be written. Cases find what earlier ones left,
    // or now and then the same byte everywhere.
    static Workspace* of[2];
    static u32 used[2];
    const u32 lanes = 1 + (c.shape >> 11 & 1), lane = lanes == 2 ? c.shape >> 12 & 1 : 0;
    const size_t all = lanes * sizeof(Workspace), idle_bytes = offsetof(Workspace, blocks);
    Workspace*& workspaces = of[lanes - 1];
    if (!workspaces) workspaces = (Workspace*)aligned_alloc(alignof(Workspace), all);
    if (used[lanes - 1]++ % 64 == 0) memset((void*)workspaces, (u8)(0xA5 + 37 * number), all);
    Workspace* w = &workspaces[lane];
    Workspace* idle = lanes == 2 ? &workspaces[1 - lane] : nullptr;
    std::vector<u8> garbage(idle_bytes, (u8)(91 * number));
    if (idle) {
        memcpy((void*)idle, garbage.data(), idle_bytes);
        ASAN_POISON_MEMORY_REGION((u8*)idle + idle_bytes, sizeof(Workspace) - idle_bytes);
    }

    const size_t out_bytes = c.out_offset + c.capacity;
    u8* out_memory = (u8*)malloc(out_bytes + behind);
    u8* out = out_memory + c.out_offset;
    memset(out_memory, 0x5A, out_bytes + behind);
    std::vector<Order> orders(lanes);
    memset((void*)orders.data(), 0xDD, lanes * sizeof(Order));
    if (idle) orders[1 - lane].nbytes = orders[1 - lane].flags = 0;
    Order* order = &orders[lane];
    order->out = out;
    order->capacity = c.capacity;
    u32 at = 0;
    for (u32 i = 0; i < c.pieces; i++) {
        const u32 nbytes = cuts[i] - at;
        // The staging memory ends with the word that has the last byte. HEADROOM is in front, of which
        // only what the last piece left over may be used.
        const size_t front = (HEADROOM + 7) / 8 * 8 + c.piece_offset;
        const size_t bytes = (front + nbytes + 7) / 8 * 8;
        u8* staging = (u8*)aligned_alloc(8, bytes);
        memset(staging, 0xC3, bytes);
        memcpy(staging + front, frame.data() + at, nbytes);
        const size_t unused = (front - (i ? w->carry_size : 0)) / 8 * 8;
        ASAN_POISON_MEMORY_REGION(staging, unused);
        order->piece = staging + front;
        order->nbytes = nbytes;
        order->flags = (i == 0 ? FIRST_PIECE : 0) | (i + 1 == c.pieces ? LAST_PIECE : 0);
        decode_piece(workspaces, orders.data(), lanes, c.shape);
        ASAN_UNPOISON_MEMORY_REGION(staging, unused);
        free(staging);
        at = cuts[i];
        order->out = (u8*)0xDDDDDDDDDDDDDDDD;  // they count with the first piece only
        order->capacity = 0;
    }
    for (u32 i = 0; i < c.out_offset; i++) require(out_memory[i] == 0x5A, "a write before the output");
    for (u32 i = 0; i < behind; i++) require(out[c.capacity + i] == 0x5A, "a write behind the output");
    if (idle) {
        ASAN_UNPOISON_MEMORY_REGION((u8*)idle + idle_bytes, sizeof(Workspace) - idle_bytes);
        const u32 error = IDLE;
        memcpy(garbage.data() + offsetof(Workspace, status.error), &error, 4);
        require(!memcmp((void*)idle, garbage.data(), idle_bytes), "a lane with nothing to do did something");
    }
    const Status& status = w->status;
    fwrite(&status, sizeof status, 1, stdout);
    if (status.error == OK) {
        require(status.produced <= c.capacity, "more than there is room for");
        fwrite(out, 1, status.produced, stdout);
    }
    free(out_memory);
}

// For each case there are a Case, where its pieces end (u32 each) and its frame; the answer is a Status
// and, if there is no error, the output.
int main()
{
    Case c;
    for (u32 number = 0; get(&c, sizeof c); number++) {
        std::vector<u32> cuts(c.pieces);
        std::vector<u8> frame(c.size);
        require(get(cuts.data(), 4ull * c.pieces) && get(frame.data(), c.size), "the case is cut off");
        u32 at = 0;
        for (u32 cut : cuts) {
            require(cut > at && cut <= c.size, "no piece may be empty");
            at = cut;
        }
        require(at == c.size, "the last piece ends with the frame");
        decode(c, frame, cuts, number);
    }
    fflush(stdout);
    return 0;
}
#endif
