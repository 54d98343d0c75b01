// Everything a user of the library includes.
#pragma once

#include "tessera/attention.h"
#include "tessera/cache.h"
#include "tessera/core.h"
#include "tessera/gate_training.h"
#include "tessera/gradient.h"
#include "tessera/method.h"
#include "tessera/model.h"
#include "tessera/plan.h"
#include "tessera/recurrent.h"
#include "tessera/recurrent_snapshot.h"
