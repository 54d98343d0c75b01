// A session as Python holds it: the model stays alive, calls take turns, Ctrl-C and cancel() end them.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "tessera/model.h"

namespace tessera::python {

namespace nb = nanobind;

class SessionHandle {
 public:
  SessionHandle(std::shared_ptr<const Model> model, SessionOptions options)
      : model_(std::move(model)), session_(*model_, watched(std::move(options))) {}

  /// Runs a function of the session without the GIL. A signal handler that raised ends the work with its exception.
  template <class Function>
  auto work(const Function& function) {
    try {
      const nb::gil_scoped_release release;
      const std::scoped_lock turn(turn_);
      cancelled_ = false;
      return function(session_);
    } catch (const Cancelled&) {
      if (PyErr_Occurred() != nullptr) throw nb::python_error();
      throw;
    }
  }
  void cancel() { cancelled_ = true; }
  const Session& session() const { return session_; }

 private:
  SessionOptions watched(SessionOptions options) {
    options.cancelled = [this] {
      if (cancelled_) return true;
      const nb::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    };
    return options;
  }

  std::shared_ptr<const Model> model_;
  std::atomic<bool> cancelled_ = false;
  std::mutex turn_;
  Session session_;
};

}  // namespace tessera::python
