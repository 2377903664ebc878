// Stop points for crash tests: HLFS_FAILPOINT=NAME:N kills the process (SIGKILL) when it passes NAME for the N-th time;
// NAME:N@FILE at each time from then on that it can remove FILE, so that servers which follow one another die as often
// as it is made. Without that variable a passage costs one predictable branch.
#pragma once

#include <unistd.h>

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
        if (!armed.name_.empty() && armed.name_ == name && armed.fires())
            std::raise(SIGKILL);
    }

  private:
    bool fires() noexcept {
        const long left = left_.fetch_sub(1);
        return file_.empty() ? left == 1 : left <= 1 && ::unlink(file_.c_str()) == 0;
    }
    Failpoint() noexcept {
        const char* text = std::getenv("HLFS_FAILPOINT");
        const std::string_view given = text != nullptr ? text : "";
        const auto colon = given.find(':');
        if (colon == std::string_view::npos)
            return;
        name_ = given.substr(0, colon);
        left_ = std::strtol(text + colon + 1, nullptr, 10);
        if (const auto at = given.find('@'); at != std::string_view::npos)
            file_ = given.substr(at + 1);
    }
    std::string name_;
    std::string file_;
    std::atomic<long> left_{0};
};

}  // namespace hlfs
