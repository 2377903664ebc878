#include "channel/mailbox.hpp"

#include <cassert>
#include <cstdarg>
#include <cstdio>

namespace hlfs {

void Mailbox::post_attach(std::uint64_t node_id) noexcept {
    {
        const std::lock_guard lock(mutex_);
        assert(attach_count_ < attaches_.size());
        attaches_[(first_attach_ + attach_count_++) % attaches_.size()] = node_id;
    }
    posted_.notify_all();
}

void Mailbox::post_copy(const CopyOrder& order) noexcept {
    {
        const std::lock_guard lock(mutex_);
        assert(copy_count_ < copies_.size());
        copies_[(first_copy_ + copy_count_++) % copies_.size()] = order;
    }
    posted_.notify_all();
}

void Mailbox::post_initialized() noexcept {
    {
        const std::lock_guard lock(mutex_);
        initialized_ = true;
    }
    posted_.notify_all();
}

void Mailbox::post_ended() noexcept {
    {
        const std::lock_guard lock(mutex_);
        ended_ = true;
    }
    posted_.notify_all();
}

void Mailbox::log(const char* format, ...) noexcept {
    std::array<char, 200> line{};
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line.data(), line.size(), format, arguments);
    va_end(arguments);
    {
        const std::lock_guard lock(mutex_);
        if (line_count_ == lines_.size()) {
            ++lines_dropped_;
            return;
        }
        lines_[(first_line_ + line_count_++) % lines_.size()] = line;
    }
    posted_.notify_all();
}

bool Mailbox::take(ChannelEvent& event) noexcept {
    if (attach_count_ > 0) {
        event.kind = ChannelEventKind::attach;
        event.node_id = attaches_[first_attach_];
        first_attach_ = (first_attach_ + 1) % attaches_.size();
        --attach_count_;
        return true;
    }
    if (copy_count_ > 0) {
        event.kind = ChannelEventKind::copy;
        event.copy = copies_[first_copy_];
        first_copy_ = (first_copy_ + 1) % copies_.size();
        --copy_count_;
        return true;
    }
    if (initialized_) {
        event.kind = ChannelEventKind::initialized;
        initialized_ = false;
        return true;
    }
    if (line_count_ > 0) {
        event.kind = ChannelEventKind::log;
        event.text = lines_[first_line_];
        first_line_ = (first_line_ + 1) % lines_.size();
        --line_count_;
        return true;
    }
    if (lines_dropped_ > 0) {
        event.kind = ChannelEventKind::log;
        std::snprintf(event.text.data(), event.text.size(), "%llu more lines were dropped",
                      static_cast<unsigned long long>(lines_dropped_));
        lines_dropped_ = 0;
        return true;
    }
    event.kind = ChannelEventKind::ended;
    return ended_;
}

void Mailbox::wait(ChannelEvent& event) noexcept {
    std::unique_lock lock(mutex_);
    posted_.wait(lock, [&] { return take(event); });
}

bool Mailbox::ended() noexcept {
    const std::lock_guard lock(mutex_);
    return ended_;
}

}  // namespace hlfs
