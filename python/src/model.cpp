// Running models.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>

#include "arrays.h"
#include "bindings.h"
#include "core/error.h"
#include "inputs.h"
#include "session.h"

namespace tessera::python {

namespace {

nb::dict to_dict(const ModelConfig& c) {
  nb::dict result;
  result["architecture"] = c.architecture;
  result["vocab_size"] = c.vocab_size;
  result["hidden_size"] = c.hidden_size;
  result["intermediate_size"] = c.intermediate_size;
  result["layers"] = c.layers;
  result["q_heads"] = c.q_heads;
  result["kv_heads"] = c.kv_heads;
  result["head_dim"] = c.head_dim;
  result["max_positions"] = c.max_positions;
  result["rope_theta"] = c.rope.theta;
  result["norm_epsilon"] = c.norm_epsilon;
  result["tied_head"] = c.tied_head;
  result["bos_token"] = nb::cast(c.bos_token);
  result["eos_tokens"] = nb::cast(c.eos_tokens);
  return result;
}

nb::dict to_dict(const SessionStatistics& s, const Session& session) {
  nb::dict result;
  result["prefill_ms"] = s.prefill_ms;
  result["decode_ms"] = s.decode_ms;
  result["attention_ms"] = s.attention_ms;
  result["prefill_tokens"] = s.prefill_tokens;
  result["decode_tokens"] = s.decode_tokens;
  result["density"] = s.density();
  result["cache_bytes"] = session.cache_bytes();
  result["cache_peak_bytes"] = s.cache_peak_bytes;
  result["cache_tokens_kept"] = session.cache_tokens_kept();
  return result;
}

nb::bytes bytes_of(std::string_view text) {
  return nb::bytes(text.data(), text.size());
}

nb::dict generate_text(SessionHandle& self, const std::vector<std::int32_t>& prompt, std::int64_t max_tokens,
                       double temperature, double top_p, std::uint64_t seed, bool stop_at_eos, bool bits_per_byte,
                       const std::optional<nb::callable>& on_text) {
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.sampling = {.temperature = temperature, .top_p = top_p, .seed = seed};
  options.stop_at_eos = stop_at_eos;
  options.bits_per_byte = bits_per_byte;
  if (on_text) {
    options.on_text = [&on_text](std::string_view bytes) {
      const nb::gil_scoped_acquire acquire;
      (*on_text)(bytes_of(bytes));
    };
  }
  const Generation generation = self.work([&](Session& session) { return generate(session, prompt, options); });
  nb::dict result;
  result["tokens"] = nb::cast(generation.tokens);
  result["text"] = bytes_of(generation.text);
  result["bits_per_byte"] = nb::cast(generation.bits_per_byte);
  return result;
}

/// The logits that a step of the session returns, [vocabulary]: a copy, for the session writes over them.
template <class Step>
nb::ndarray<nb::numpy, float> logits_of(SessionHandle& self, const Step& step) {
  std::vector<float> logits = self.work([&](Session& session) {
    const std::span<const float> found = step(session);
    return std::vector<float>(found.begin(), found.end());
  });
  const std::size_t count = logits.size();
  return numpy_array(std::move(logits), {count});
}

void bind_session(nb::module_& module) {
  nb::class_<SessionHandle>(module, "Session", "One sequence in a model.")
      .def(
          "__init__",
          [](SessionHandle* self, std::shared_ptr<const Model> model, const MethodHandle* prefill,
             const MethodHandle* decode, const std::string& kv_dtype, std::optional<std::int64_t> chunk,
             std::int64_t capacity, const CallOptions& options, const std::optional<nb::callable>& on_plan) {
            SessionOptions wanted;
            if (prefill != nullptr) wanted.prefill = prefill->method;
            if (decode != nullptr) wanted.decode = decode->method;
            wanted.kv_dtype = cache_type_from_name(kv_dtype);
            wanted.chunk = chunk;
            wanted.capacity = capacity;
            wanted.run = options.run();
            if (on_plan) {
              wanted.on_plan = [callable = *on_plan](std::int64_t layer, const Plan& plan) {
                const nb::gil_scoped_acquire acquire;
                callable(layer, Plan(plan));
              };
            }
            new (self) SessionHandle(std::move(model), std::move(wanted));
          },
          nb::arg("model"), nb::arg("prefill").none(), nb::arg("decode").none(), nb::arg("kv_dtype"),
          nb::arg("chunk").none(), nb::arg("capacity"), nb::arg("options"), nb::arg("on_plan").none())
      .def(
          "prefill",
          [](SessionHandle& self, const std::vector<std::int32_t>& tokens) {
            return logits_of(self, [&](Session& session) { return session.prefill(tokens); });
          },
          nb::arg("tokens"))
      .def(
          "decode",
          [](SessionHandle& self, std::int32_t token) {
            return logits_of(self, [&](Session& session) { return session.decode(token); });
          },
          nb::arg("token"))
      .def("generate", &generate_text, nb::arg("prompt"), nb::arg("max_tokens") = 128, nb::arg("temperature") = 0.0,
           nb::arg("top_p") = 1.0, nb::arg("seed") = 0, nb::arg("stop_at_eos") = true, nb::arg("bits_per_byte") = false,
           nb::arg("on_text") = nb::none())
      .def("reset", [](SessionHandle& self) { self.work([](Session& session) { session.reset(); }); })
      .def("cancel", &SessionHandle::cancel, "Ends the call that another thread runs.")
      .def_prop_ro("tokens", [](SessionHandle& self) { return self.work([](Session& s) { return s.tokens(); }); })
      .def_prop_ro("capacity", [](SessionHandle& self) { return self.work([](Session& s) { return s.capacity(); }); })
      .def_prop_ro("statistics", [](SessionHandle& self) {
        const nb::gil_scoped_acquire acquire;
        return to_dict(self.session().statistics(), self.session());
      });
}

}  // namespace

void bind_model(nb::module_& module) {
  nb::class_<Model>(module, "Model", "A language model, of a folder in Hugging Face layout or a *.gguf file.")
      .def_static(
          "load",
          [](const std::string& folder, int threads, const std::string& weights) {
            const LoadOptions options{weight_memory_from_name(weights), threads};
            const nb::gil_scoped_release release;
            return std::make_shared<Model>(Model::load(folder, options));
          },
          nb::arg("folder"), nb::arg("threads") = 0, nb::arg("weights") = "auto")
      .def_prop_ro("config", [](const Model& self) { return to_dict(self.config()); })
      .def_prop_ro("weight_bytes", &Model::weight_bytes)
      .def(
          "encode",
          [](const Model& self, const nb::bytes& text, bool with_bos) {
            return self.encode({text.c_str(), text.size()}, with_bos);
          },
          nb::arg("text"), nb::arg("with_bos") = true)
      .def(
          "decode",
          [](const Model& self, const std::vector<std::int32_t>& tokens) { return bytes_of(self.decode(tokens)); },
          nb::arg("tokens"));
  bind_session(module);
}

}  // namespace tessera::python
