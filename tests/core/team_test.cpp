// Loops that a team serves: every item once, in whatever company.
#include "core/team.h"

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/parallel.h"

namespace tessera {
namespace {

std::vector<int> counts_of(std::int64_t count, int threads, std::int64_t together) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
  parallel_for(
      count, threads, [&](std::int64_t i, int) { ++seen[static_cast<std::size_t>(i)]; }, together);
  return {seen.begin(), seen.end()};
}

TEST(Team, RunsEveryItemOnce) {
  with_team(4, [] {
    ASSERT_NE(Team::current(), nullptr);
    for (const std::int64_t count : {0, 1, 2, 3, 7, 1000}) {
      for (const std::int64_t together : {1, 2, 5, 2000}) {
        for (const int threads : {0, 1, 2, 3, 4, 9}) {
          EXPECT_EQ(counts_of(count, threads, together), std::vector<int>(static_cast<std::size_t>(count), 1))
              << count << " items, " << together << " together, " << threads << " threads";
        }
      }
    }
  });
  EXPECT_EQ(Team::current(), nullptr);
}

TEST(Team, ServesManyShortLoops) {
  constexpr std::int64_t loops = 20000;
  std::atomic<std::int64_t> items = 0;
  with_team(3, [&] {
    for (std::int64_t loop = 0; loop < loops; ++loop) {
      parallel_for(1 + loop % 5, 0, [&](std::int64_t, int) { ++items; });
      // What a loop wrote is there behind it, and the items of one loop are never those of another.
      ASSERT_EQ(items, (loop + 1) / 5 * 15 + (loop + 1) % 5 * ((loop + 1) % 5 + 1) / 2);
    }
  });
}

TEST(Team, WakesThreadsThatSleep) {
  with_team(3, [] {
    for (int i = 0; i < 5; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
      // Nobody gets through unless another thread has come.
      std::atomic<int> arrived = 0;
      parallel_for(2, 0, [&](std::int64_t, int) {
        ++arrived;
        while (arrived < 2) std::this_thread::yield();
      });
    }
  });
}

TEST(Team, ThreadsHaveNumbersBelowTheirCount) {
  with_team(4, [] {
    EXPECT_EQ(thread_count(0), Team::current()->size());
    EXPECT_LE(Team::current()->size(), 4);
    EXPECT_EQ(thread_count(100), Team::current()->size());
    for (const int threads : {1, 2, 3}) {
      std::atomic<int> highest = -1;
      EXPECT_LE(thread_count(threads), threads);
      parallel_for(500, threads, [&](std::int64_t, int thread) {
        for (int seen = highest; seen < thread && !highest.compare_exchange_weak(seen, thread);) {
        }
      });
      EXPECT_GE(highest, 0);
      EXPECT_LT(highest, thread_count(threads));
    }
  });
}

TEST(Team, InnerLoopsAndTeamsStayOnTheirThread) {
  with_team(3, [] {
    const Team* outer = Team::current();
    with_team(2, [&] { EXPECT_EQ(Team::current(), outer); });
    std::atomic<int> items = 0;
    parallel_for(6, 0, [&](std::int64_t, int) {
      EXPECT_EQ(Team::current(), nullptr);
      EXPECT_EQ(thread_count(0), 1);
      with_team(2, [&] { EXPECT_EQ(Team::current(), nullptr); });
      const auto own = std::this_thread::get_id();
      parallel_for(10, 0, [&](std::int64_t, int thread) {
        EXPECT_EQ(thread, 0);
        EXPECT_EQ(std::this_thread::get_id(), own);
        ++items;
      });
    });
    EXPECT_EQ(items, 60);
    EXPECT_EQ(Team::current(), outer);
  });
}

TEST(Team, OneThreadNeedsNoTeam) {
  with_team(1, [] { EXPECT_EQ(Team::current(), nullptr); });
  parallel_for(4, 4, [](std::int64_t, int) { with_team(4, [] { EXPECT_EQ(Team::current(), nullptr); }); });
}

TEST(Team, CarriesExceptions) {
  std::atomic<int> items = 0;
  const auto fails_at = [&](std::int64_t failing) {
    parallel_for(100, 0, [&, failing](std::int64_t i, int) {
      ++items;
      if (i == failing) throw std::out_of_range("item");
    });
  };
  with_team(3, [&] {
    EXPECT_THROW(fails_at(50), std::out_of_range);
    EXPECT_EQ(items, 100);
    fails_at(-1);  // the team goes on
    EXPECT_EQ(items, 200);
  });
  EXPECT_THROW(with_team(3, [&] { fails_at(99); }), std::out_of_range);
  EXPECT_EQ(items, 300);
  EXPECT_THROW(with_team(3, [] { throw std::runtime_error("body"); }), std::runtime_error);
  EXPECT_EQ(Team::current(), nullptr);
}

TEST(Team, ThreadsOfTheProgramHaveTeamsOfTheirOwn) {
  std::atomic<std::int64_t> items = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      with_team(2, [&] {
        for (int loop = 0; loop < 300; ++loop) parallel_for(7, 0, [&](std::int64_t, int) { ++items; });
      });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(items, 3 * 300 * 7);
}

}  // namespace
}  // namespace tessera
