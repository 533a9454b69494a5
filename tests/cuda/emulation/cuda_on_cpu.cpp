// The emulator's fibers and their scheduler, shared memory, asynchronous copies, and the runtime's functions.
#include "cuda_on_cpu.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

namespace pk_emulated {

__thread Position* position;
__thread Extent* extent;

namespace {

constexpr size_t STACK = 256 << 10, STATIC_SHARED = 48 << 10, DYNAMIC_SHARED_OPTIN = 99 << 10;
constexpr int WARP = 32;

enum class State { RUNNABLE, AT_BARRIER, IN_WARP_OP, DONE };

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber : Position {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  const char* what;  // the file of the barrier, or the name of the warp operation
  int line;          // of the barrier
  unsigned mask;
  bool whole_warp;
  void* operand;
  Combine combine;
  std::vector<Copy> open;                  // copies issued, not committed
  std::vector<std::vector<Copy>> groups;   // committed, oldest first
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept for the next block: their stacks are large
  size_t threads = 0;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  std::map<const void*, std::unique_ptr<unsigned char[]>> shared;
  std::map<const void*, size_t> shared_sizes;
  size_t shared_total = 0, dynamic_bytes = 0;
  bool asked = false;  // for more than what a block gets without asking
  std::unique_ptr<unsigned char[]> dynamic;
  bool failed = false;
};

thread_local Block block;
thread_local char message[1024];
thread_local cudaError_t last = cudaSuccess;
thread_local std::map<const void*, int> dynamic_limit;
unsigned order = 0;
int capability = 86;
int64_t launches = 0;
std::set<const void*> kernels;  // those that were launched

void to_scheduler() { swapcontext(&block.running->context, &block.scheduler); }

void report(const char* format, va_list list) {
  vsnprintf(message, sizeof message, format, list);
  block.failed = true;
  last = cudaErrorLaunchFailure;
}
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
void report(const char* format, ...) {
  va_list list;
  va_start(list, format);
  report(format, list);
  va_end(list);
}

void entry() {
  (*block.body)();
  Fiber* self = block.running;
  bool unfinished = !self->open.empty();
  for (const std::vector<Copy>& group : self->groups) unfinished |= !group.empty();
  if (unfinished) report("thread %u returned with asynchronous copies under way: a wait is missing", self->thread.x);
  self->state = State::DONE;
  to_scheduler();
}

void resume(Fiber* fiber) {
  block.running = fiber;
  position = fiber;
  swapcontext(&block.scheduler, &fiber->context);
  block.running = nullptr;
}

Fiber* at(size_t thread) { return block.fibers[thread].get(); }

// Runs warp operations whose lanes are all there; true if there was one.
bool release_warp(size_t first) {
  const size_t lanes = std::min<size_t>(WARP, block.threads - first);
  for (size_t l = 0; l < lanes; l++) {
    Fiber* leader = at(first + l);
    if (leader->state != State::IN_WARP_OP) continue;
    void* operands[WARP] = {};
    bool complete = true;
    for (size_t i = 0; i < WARP && complete; i++) {
      if (!(leader->mask >> i & 1)) continue;
      const Fiber* lane = i < lanes ? at(first + i) : nullptr;
      if (!lane || lane->state == State::DONE) {
        if (leader->whole_warp) complete = false;
        continue;  // lanes that have returned do not hold the others up
      }
      if (lane->state != State::IN_WARP_OP || lane->mask != leader->mask || strcmp(lane->what, leader->what)) complete = false;
      operands[i] = lane->operand;
    }
    if (!complete) continue;
    leader->combine(operands);
    for (size_t i = 0; i < lanes; i++)
      if (leader->mask >> i & 1 && at(first + i)->state != State::DONE) at(first + i)->state = State::RUNNABLE;
    return true;
  }
  return false;
}

// Releases the barrier if every thread waits at the same one.
bool release_barrier() {
  const Fiber* first = at(0);
  for (size_t t = 0; t < block.threads; t++) {
    const Fiber* f = at(t);
    if (f->state != State::AT_BARRIER || f->line != first->line || strcmp(f->what, first->what)) return false;
  }
  for (size_t t = 0; t < block.threads; t++) at(t)->state = State::RUNNABLE;
  return true;
}

void report_deadlock() {
  const char* const STATES[] = {"runs", "waits at a barrier", "waits in a warp operation", "has returned"};
  char text[800];
  size_t used = 0;
  const Fiber* before = nullptr;
  for (size_t t = 0; t < block.threads && used + 1 < sizeof text; t++) {
    const Fiber* f = at(t);
    if (before && before->state == f->state && before->line == f->line && before->mask == f->mask && before->what == f->what) continue;
    int wrote = snprintf(text + used, sizeof text - used, "; from thread %zu on: %s", t, STATES[(int)f->state]);
    if (f->state == State::AT_BARRIER) wrote += snprintf(text + used + wrote, sizeof text - used - wrote, " (line %d)", f->line);
    if (f->state == State::IN_WARP_OP) {
      wrote += snprintf(text + used + wrote, sizeof text - used - wrote, " (%s, mask %08x)", f->what, f->mask);
    }
    used = std::min(sizeof text - 100, used + (size_t)wrote);
    before = f;
    if (used >= sizeof text - 100) break;
  }
  report("block %u: a barrier or warp operation that not all threads reach%s", at(0)->block.x, text);
}

bool run_runnable(const std::vector<size_t>& threads) {
  bool ran = false;
  for (size_t t : threads) {
    if (block.failed) return false;
    if (at(t)->state != State::RUNNABLE) continue;
    resume(at(t));
    ran = true;
  }
  return ran;
}

bool all_done() {
  for (size_t t = 0; t < block.threads; t++)
    if (at(t)->state != State::DONE) return false;
  return true;
}

void run_block(const std::vector<std::vector<size_t>>& turns) {
  while (!block.failed && !all_done()) {
    bool progress = false;
    for (const std::vector<size_t>& turn : turns) {
      bool more = true;
      while (more && !block.failed) {
        more = run_runnable(turn);
        for (size_t first = 0; first < block.threads; first += WARP) more |= release_warp(first);
        progress |= more;
      }
    }
    if (block.failed || all_done()) return;
    if (!progress && !release_barrier()) report_deadlock();
  }
}

// The order in which threads get their turn: lists of threads, each run until none of it can go on.
std::vector<std::vector<size_t>> make_turns(size_t threads) {
  std::vector<std::vector<size_t>> turns;
  if (order >= 2) {
    turns.emplace_back();
    for (size_t t = 0; t < threads; t++) turns[0].push_back(t);
    std::shuffle(turns[0].begin(), turns[0].end(), std::mt19937(order));
    return turns;
  }
  for (size_t first = 0; first < threads; first += WARP) {
    turns.emplace_back();
    for (size_t t = first; t < std::min(threads, first + WARP); t++) turns.back().push_back(t);
  }
  if (order == 1) {
    std::reverse(turns.begin(), turns.end());
    for (auto& turn : turns) std::reverse(turn.begin(), turn.end());
  }
  return turns;
}

void start_block(dim3 index) {
  block.shared.clear();
  block.shared_sizes.clear();
  block.shared_total = 0;
  block.dynamic.reset(new unsigned char[block.dynamic_bytes]);
  memset(block.dynamic.get(), 0xff, block.dynamic_bytes);
  for (size_t t = 0; t < block.threads; t++) {
    Fiber* f = at(t);
    f->block = index;
    f->thread = dim3((unsigned)t, 0, 0);
    f->state = State::RUNNABLE;
    f->what = "";
    f->line = 0;
    f->mask = 0;
    f->open.clear();
    f->groups.clear();
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.get();
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, entry, 0);
  }
}

void carry_out(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.from) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  report(format, list);
  va_end(list);
  to_scheduler();
  abort();  // a failed block's fibers are not resumed
}

int lane() { return (int)(position->thread.x % WARP); }

void barrier(const char* file, int line) {
  Fiber* self = block.running;
  self->what = file;
  self->line = line;
  self->state = State::AT_BARRIER;
  to_scheduler();
}

void collective(const char* name, unsigned mask, bool whole_warp, void* operand, Combine combine) {
  Fiber* self = block.running;
  if (!(mask >> lane() & 1)) fail("thread %u: %s with a mask (%08x) that lacks the lane itself", self->thread.x, name, mask);
  self->what = name;
  self->line = 0;
  self->mask = mask;
  self->whole_warp = whole_warp;
  self->operand = operand;
  self->combine = combine;
  self->state = State::IN_WARP_OP;
  to_scheduler();
}

bool in_shared(const void* p, size_t bytes) {
  const unsigned char* from = (const unsigned char*)p;
  if (from >= block.dynamic.get() && from + bytes <= block.dynamic.get() + block.dynamic_bytes) return true;
  for (const auto& [identity, memory] : block.shared)
    if (from >= memory.get() && from + bytes <= memory.get() + block.shared_sizes[identity]) return true;
  return false;
}

void* shared_array(const void* identity, size_t bytes) {
  std::unique_ptr<unsigned char[]>& memory = block.shared[identity];
  if (!memory) {
    block.shared_total += bytes;
    if (block.shared_total > STATIC_SHARED) fail("%zu bytes of static shared memory, the limit is %zu", block.shared_total, STATIC_SHARED);
    const size_t together = block.shared_total + block.dynamic_bytes;
    const size_t limit = block.asked ? DYNAMIC_SHARED_OPTIN + 1024 : STATIC_SHARED;
    if (together > limit) fail("%zu bytes of static and dynamic shared memory together, not %zu", together, limit);
    memory.reset(new unsigned char[bytes]);
    memset(memory.get(), 0xff, bytes);
    block.shared_sizes[identity] = bytes;
  }
  return memory.get();
}

unsigned char* dynamic_shared() { return block.dynamic.get(); }

void launch(dim3 grid, unsigned threads, size_t shared_bytes, const void* kernel, const std::function<void()>& body) {
  launches++;
  kernels.insert(kernel);
  block.failed = false;
  const auto limit = dynamic_limit.find(kernel);
  const size_t allowed = limit == dynamic_limit.end() ? 48 << 10 : (size_t)limit->second;
  const bool grid_fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  if (!grid_fits || !threads || threads > 1024 || shared_bytes > allowed) {
    report("invalid configuration: grid %u x %u x %u, %u threads, %zu bytes shared", grid.x, grid.y, grid.z, threads, shared_bytes);
    return;
  }
  while (block.fibers.size() < threads) {
    block.fibers.push_back(std::make_unique<Fiber>());
    block.fibers.back()->stack.reset(new char[STACK]);
  }
  block.threads = threads;
  block.body = &body;
  block.dynamic_bytes = shared_bytes;
  block.asked = limit != dynamic_limit.end();
  Extent sizes = {dim3(threads), grid};
  extent = &sizes;
  const std::vector<std::vector<size_t>> turns = make_turns(threads);
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && !block.failed; i++) {
    const uint64_t b = order == 1 ? blocks - 1 - i : i;
    start_block(dim3((unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)));
    run_block(turns);
  }
}

void copy_async16(void* shared, const void* global, bool valid) {
  need_aligned("cp.async's target", shared);
  need_shared("cp.async's target", shared);
  if (valid) need_aligned("cp.async's source", global);
  memset(shared, 0xff, 16);
  block.running->open.push_back({shared, valid ? global : nullptr});
}

void copy_async_commit() {
  Fiber* self = block.running;
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void copy_async_wait(int newest) {
  std::vector<std::vector<Copy>>& groups = block.running->groups;
  while ((int)groups.size() > newest) {
    carry_out(groups.front());
    groups.erase(groups.begin());
  }
}

}  // namespace pk_emulated

using namespace pk_emulated;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return message;
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > (int)DYNAMIC_SHARED_OPTIN) return cudaErrorInvalidValue;
  dynamic_limit[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 12080, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
           : attribute == cudaDevAttrMultiProcessorCount    ? 82
                                                            : (int)DYNAMIC_SHARED_OPTIN;
  return cudaSuccess;
}

extern "C" {
// What -fsanitize=alignment calls where a vector is read or written at an address that the hardware would fault at; libubsan is not linked.
struct Mismatch {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const Mismatch* at, uintptr_t address) {
  if (!position) abort();
  fail("thread %u: %s, line %u: an access to a misaligned address (%#zx)", position->thread.x, at->file, at->line, (size_t)address);
}

void pk_emulation_order(unsigned value) { order = value; }
void pk_emulation_capability(int value) { capability = value; }
int64_t pk_emulation_launches() { return launches; }
int64_t pk_emulation_kernels(uint64_t* offsets, int64_t room) {
  Dl_info library;
  if (!dladdr((const void*)&pk_emulation_kernels, &library)) return -1;
  int64_t count = 0;
  for (const void* kernel : kernels)
    if (count++ < room) offsets[count - 1] = (const char*)kernel - (const char*)library.dli_fbase;
  return count;
}
}
