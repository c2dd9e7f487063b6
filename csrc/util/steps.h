// Steps that are all taken, whatever fails: on the way out nothing may be left undone.
//
//   Steps steps;
//   steps.run([&] { a(); });
//   steps.run([&] { b(); });   also where a() threw
//   steps.rethrow();           what failed first; dropped without this call
#pragma once

#include <exception>

namespace wsm {

class Steps {
 public:
  template <typename Step>
  void run(const Step& step) {
    try {
      step();
    } catch (...) {
      if (!first_) first_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

}  // namespace wsm
