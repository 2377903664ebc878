// Stop points for crash tests: HLFS_FAILPOINT=NAME:N kills the process (SIGKILL) when it passes NAME for the N-th time.
// Without that variable a passage costs one predictable branch.
#pragma once

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <string>
#include <string_view>

namespace hlfs {

class Failpoint {
  public:
    static void pass(std::string_view name) noexcept {
        static Failpoint armed;
        if (!armed.name_.empty() && armed.name_ == name && armed.left_.fetch_sub(1) == 1)
            std::raise(SIGKILL);
    }

  private:
    Failpoint() noexcept {
        const char* text = std::getenv("HLFS_FAILPOINT");
        const std::string_view given = text != nullptr ? text : "";
        const auto colon = given.find(':');
        if (colon == std::string_view::npos)
            return;
        name_ = given.substr(0, colon);
        left_ = std::strtol(text + colon + 1, nullptr, 10);
    }
    std::string name_;
    std::atomic<long> left_{0};
};

}  // namespace hlfs
