// How a method file enters the registry.
//
// A method is a type with
//   struct Params { ...fields with defaults...; void visit(ParameterList& v); };
//   static MethodInfo info();
//   explicit Type(Params);                        (or an aggregate whose first member is Params)
//   Plan plan(const Problem&, const AttentionInputs&, const PlanContext&) const;
// or, for a recurrence, which has no plan, attend() alone; and optionally
//   static constexpr bool reads_inputs = false;   patterns: plan() looks at neither q nor k
//   RunReport attend(...) const;                  methods with branches or corrections
//   RunReport backward(...) const;                their gradients (plain plans need none: Method::backward does)
//   std::unique_ptr<MethodState> new_state() const;
//   std::int64_t prefill_tile() const;            with these parameters; left out: prompts come whole
//   std::unique_ptr<LayerCache> new_cache(const LayerCacheShape&, const PlanContext&) const;  methods that evict
//   void check_model(layers, q_heads, kv_heads) const;   methods whose configuration fits one model only
// and its file src/methods/<family>/<stem>.cpp ends with TESSERA_METHOD(stem, Type). The build lists the files, so
// nothing else is touched.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "methods/parameters.h"
#include "tessera/method.h"

namespace tessera {

template <class Type>
concept HasPlan = requires {
  &Type::plan;
};

template <class Type>
concept OwnsCache = requires(const Type& method, const LayerCacheShape& shape, const PlanContext& context) {
  method.new_cache(shape, context);
};

/// info() of a type, with what follows from the type itself.
template <class Type>
MethodInfo info_of() {
  MethodInfo info = Type::info();
  info.has_plan = HasPlan<Type>;
  info.own_cache = OwnsCache<Type>;
  return info;
}

/// Throws Error for a problem outside of info.domain.
void check_domain(const MethodInfo& info, const Problem& problem);
/// Throws the Error of Method::plan for a method without plan.
[[noreturn]] void refuse_plan(const MethodInfo& info);

/// Method over a concrete type: checks what every method would have to check.
template <class Type>
class BoundMethod final : public Method {
 public:
  explicit BoundMethod(typename Type::Params params)
      : info_(info_of<Type>()), parameters_(parameters_of(params).to_json()), method_{std::move(params)} {}

  const MethodInfo& info() const override { return info_; }
  std::string parameters() const override { return parameters_; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const override {
    if constexpr (HasPlan<Type>) {
      check(problem, inputs);
      return method_.plan(problem, inputs, context);
    } else {
      refuse_plan(info_);
    }
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const override {
    if constexpr (requires { method_.attend(problem, inputs, outputs, context, executed); }) {
      check_inputs(problem, inputs);
      check_domain(info_, problem);
      return method_.attend(problem, inputs, outputs, context, executed);
    } else {
      return Method::attend(problem, inputs, outputs, context, executed);
    }
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* executed) const override {
    if constexpr (requires { method_.backward(problem, inputs, saved, gradients, context, executed); }) {
      check_inputs(problem, inputs);
      check_domain(info_, problem);
      return method_.backward(problem, inputs, saved, gradients, context, executed);
    } else {
      return Method::backward(problem, inputs, saved, gradients, context, executed);
    }
  }

  bool runs_its_plan() const override {
    return !requires(const AttentionInputs& inputs, const AttentionOutputs& outputs, const PlanContext& context) {
      method_.attend(Problem{}, inputs, outputs, context, static_cast<Plan*>(nullptr));
    };
  }

  std::unique_ptr<MethodState> new_state() const override {
    if constexpr (requires { method_.new_state(); }) {
      return method_.new_state();
    } else {
      return nullptr;
    }
  }

  std::int64_t prefill_tile() const override {
    if constexpr (requires { method_.prefill_tile(); }) {
      return method_.prefill_tile();
    } else {
      return 0;
    }
  }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext& context) const override {
    if constexpr (OwnsCache<Type>) {
      return method_.new_cache(shape, context);
    } else {
      return Method::new_cache(shape, context);
    }
  }

  void check_model(std::int64_t layers, std::int64_t q_heads, std::int64_t kv_heads) const override {
    if constexpr (requires { method_.check_model(layers, q_heads, kv_heads); }) {
      method_.check_model(layers, q_heads, kv_heads);
    }
  }

 private:
  void check(const Problem& problem, const AttentionInputs& inputs) const {
    if constexpr (requires { requires !Type::reads_inputs; }) {
      problem.validate();
    } else {
      check_inputs(problem, inputs);
    }
    check_domain(info_, problem);
  }

  MethodInfo info_;
  std::string parameters_;
  Type method_;
};

/// The registry row of a method type.
template <class Type>
MethodEntry entry_of() {
  typename Type::Params defaults;
  return {info_of<Type>(), parameters_of(defaults).describe(),
          [](std::string_view parameters) -> std::unique_ptr<const Method> {
            typename Type::Params params;
            parameters_of(params).assign(Type::info().name, parameters);
            return std::make_unique<BoundMethod<Type>>(std::move(params));
          }};
}

}  // namespace tessera

/// The one registration line of a method file; at global scope. `stem` is the file's name without folder and ending.
#define TESSERA_METHOD(stem, Type)      \
  namespace tessera::method_files {     \
  ::tessera::MethodEntry stem() {       \
    return ::tessera::entry_of<Type>(); \
  }                                     \
  }                                     \
  static_assert(true)
