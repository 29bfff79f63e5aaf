# Tasks of this repository. `make` alone lists them.

.DEFAULT_GOAL := help
# The steps of a check run in the order they are written, also with -j, but for
# those that `make test` runs side by side.
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif

# Use the Go that is installed and never download another one in passing.
export GOTOOLCHAIN := local
# No version-control stamp: a checkout owned by another user builds, too. No paths:
# what one checkout has built is good for the next.
export GOFLAGS := $(strip $(shell go env GOFLAGS) -buildvcs=false -trimpath)

# Developer tools have a module of their own, so that nothing they need reaches
# go.mod. Go builds them on first use and caches the result.
tool := go tool -modfile="$(CURDIR)/tools/go.mod"

# Modules inside this one, as far as they exist. tools has no code of its own.
inner := $(filter-out tools,$(patsubst %/go.mod,%,$(wildcard */go.mod examples/*/go.mod)))
# These only pin programs of others.
pinned := $(patsubst %/go.mod,%,$(wildcard e2e/images/*/go.mod))

# Settings of the tasks: make unit PKG=./mono RUN=TestStop
PKG         ?= ./...
RUN         ?=
TIMEOUT     ?= 40m
BENCH       ?= .
BENCHTIME   ?= 1s
COUNT       ?= 1
ROUNDS      ?= 10
COMPARISONS ?= 5
SCALES      ?= 1
BASE        ?= main
REGRESSIONS ?= 10
WORK        ?=
JSON        ?=
KILLS       ?= 200
CHAOS_FOR   ?= 10m
SEEDS       ?= 1
# That of a run to repeat; without it there is a new one each time.
CHAOS_SEED  ?=
# Tests of a package that run at a time. They wait more than they compute.
PARALLEL    ?= 3
DEADLETTERS ?= 1000000
TIME        ?= 30s

.PHONY: help
help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  unit, race, bench and cover take PKG=./mono, RUN=TestName, TIMEOUT=10m;"
	@echo "  bench takes BENCH=Name, BENCHTIME=1s and COUNT=10 as well;"
	@echo "  regress takes BASE=revision, REGRESSIONS=10, WORK='^ConsumeAck' and JSON=file."

# What counts allocations and what is over in seconds comes first. The others wait
# for servers more than they compute, and wait together. What two of them need is
# built once, before both.
.PHONY: test
test: race-ready check-fmt check-tidy vet build allocs ## the whole check: what must pass before a change lands
	@$(MAKE) --no-print-directory -j3 --output-sync=line SIDE_BY_SIDE=1 race e2e lint modules

ifdef SIDE_BY_SIDE
modules: images
endif

.PHONY: unit
unit: ## only the tests, without the race detector
	@echo "==> run the tests"
	@go test -timeout=$(TIMEOUT) -run='$(RUN)' $(PKG)

# The packages that take longest begin first. vet has its own task.
.PHONY: race
race: race-ready ## only the tests, with the race detector and in random order
	@echo "==> run the tests with the race detector, in random order"
	@go test -race -vet=off -shuffle=on -parallel=$(PARALLEL) -timeout=$(TIMEOUT) -run='$(RUN)' $(if $(filter ./...,$(PKG)),./mono ./dlq/triage ./dlq) $(PKG)

.PHONY: lint
lint: ## run the linters
	@echo "==> lint"
	@$(tool) golangci-lint run ./...
	@for m in $(inner); do echo "==> lint $$m"; (cd "$$m" && $(tool) golangci-lint run ./...) || exit 1; done

.PHONY: fmt
fmt: ## format the code
	@echo "==> format"
	@$(tool) golangci-lint fmt

.PHONY: tidy
tidy: ## tidy go.mod and go.sum of every module
	@for m in . tools $(inner) $(pinned); do echo "==> tidy $$m"; (cd "$$m" && go mod tidy) || exit 1; done

.PHONY: modules
modules: ## only the tests of the modules inside this one, but for e2e; promtool is built the first time, which takes minutes
	@for m in $(filter-out e2e,$(inner)); do echo "==> run the tests of $$m"; (cd "$$m" && go test -timeout=$(TIMEOUT) ./...) || exit 1; done
	@echo "==> not run here: the kept schedules of chaos, which make chaos begins with"

# Without a Docker engine the same programs run as local processes.
runtime = $(or $(E2E_RUNTIME),$(shell { docker info && { docker compose version || docker-compose version; }; } >/dev/null 2>&1 && echo docker || echo process))

.PHONY: images
images: ## build the programs and the images of the end-to-end run from Go modules, about 15 minutes the first time
	@runtime=$(runtime) && e2e/images/build $$([ $$runtime = docker ] || echo --binaries-only)

.PHONY: e2e
e2e: images ## start the whole stack and look at it from outside: Jaeger, Prometheus, faults; E2E_RUNTIME=process does without Docker
	@runtime=$(runtime) && echo "==> run the end-to-end tests ($$runtime)" && \
	cd e2e && go test ./images/... && E2E_RUNTIME=$$runtime go test -count=1 -timeout=$(TIMEOUT) -run='$(RUN)' -v .

.PHONY: demo
demo: ## start the demo of docs/demo.md, and say where it is; DEMO_IMAGES=built does without a registry, and without Grafana
	@deploy/demo $(DEMO_IMAGES)

.PHONY: chaos
chaos: ## break everything around Apps in processes of their own for CHAOS_FOR, 10m, with SEEDS seeds, 1, and reconcile each message
	@echo "==> break everything, for $(CHAOS_FOR)"
	@cd chaos && CHAOS_KEPT=1 go test -count=1 -timeout=$(TIMEOUT) -run='^TestKept$$' .
	@cd chaos && go run . run --for $(CHAOS_FOR) --seeds $(SEEDS) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

.PHONY: kills
kills: ## kill a consumer's process KILLS times, for each kind of stream, and look for what is lost
	@echo "==> kill consumers at random points, $(KILLS) times for each retention"
	@dir="$$(mktemp -d)" && trap 'rm -rf "$$dir"' EXIT && go test -c -o "$$dir/mono.test" ./mono && \
	MONO_CHAOS=$(KILLS) "$$dir/mono.test" -test.run='^TestChaos_manyKills$$' -test.parallel=3 -test.timeout=$(TIMEOUT)

.PHONY: bench
bench: ## run the benchmarks
	@echo "==> run the benchmarks"
	@go test -run='^$$' -bench='$(BENCH)' -benchmem -benchtime=$(BENCHTIME) -count=$(COUNT) -timeout=0 $(PKG)

.PHONY: performance
performance: ## measure against nats.go and write docs/performance.md
	@echo "==> run the paired benchmarks, $(ROUNDS) rounds"
	@dir="$$(mktemp -d)" && trap 'rm -rf "$$dir"' EXIT && \
	go test -c -o "$$dir/mono.test" ./mono && go test -c -o "$$dir/messaging.test" ./telemetry/messaging && \
	for i in $$(seq $(ROUNDS)); do \
		for t in mono messaging; do \
			"$$dir/$$t.test" -test.run='^$$' -test.bench=. -test.benchtime=0.5s >> "$$dir/bench.txt" || { cat "$$dir/bench.txt"; exit 1; }; \
		done; \
	done && \
	go run ./internal/perftable docs/performance.md < "$$dir/bench.txt"

.PHONY: comparison
comparison: ## compare with nats.go, Watermill and go-monolith, COMPARISONS rounds, 5, of about 6 minutes each
	@echo "==> compare, $(COMPARISONS) rounds"
	@dir="$$(mktemp -d)" && trap 'rm -rf "$$dir"' EXIT && cd bench && go build -o "$$dir/bench" . && \
	"$$dir/bench" run --rounds $(COMPARISONS) --out "$$dir/results.txt" && \
	"$$dir/bench" report "$$dir/results.txt" --write ../docs/performance.md --benchstat ../docs/performance-benchstat.txt

.PHONY: regress
regress: ## compare this tree with BASE, main, REGRESSIONS rounds, 10, of about 2 minutes each; fails if it is slower
	@echo "==> compare with $(BASE), $(REGRESSIONS) rounds"
	@cd bench && go run . regress --base '$(BASE)' --rounds $(REGRESSIONS) --work '$(WORK)' $(if $(JSON),--json '$(abspath $(JSON))')

.PHONY: scale
scale: ## measure on a cluster of three servers, and write docs/scaling.md; SCALES rounds, 1, of about 4 minutes each
	@echo "==> measure on a cluster of three servers"
	@cd bench && go run . scale --rounds $(SCALES)

.PHONY: million
million: ## measure the command with DEADLETTERS dead letters, 1 000 000, and write that into docs/performance.md
	@echo "==> monotel dlq with $(DEADLETTERS) dead letters: about three minutes, 2 GB in a temporary folder"
	@dir="$$(mktemp -d)" && trap 'rm -rf "$$dir"' EXIT && \
	{ MONOTEL_MILLION=$(DEADLETTERS) go test -run='^$$' -bench='^BenchmarkMillion$$' -benchtime=1x -timeout=0 ./internal/cli > "$$dir/bench.txt" || { cat "$$dir/bench.txt"; exit 1; }; } && \
	go run ./internal/perftable -million docs/performance.md < "$$dir/bench.txt"

.PHONY: dashboards
dashboards: ## write the boards, the rules and the list of their queries from the code
	@echo "==> write dashboards"
	@cd dashboards && go run .

.PHONY: docs
docs: ## write the pages that are made from the code
	@echo "==> write docs/metrics.md"
	@go run ./internal/metricdoc docs/metrics.md

.PHONY: cover
cover: ## run the tests and report what they reach (coverage.out, coverage.html)
	@echo "==> run the tests with coverage"
	@go test -timeout=$(TIMEOUT) -run='$(RUN)' -covermode=atomic -coverpkg=./... -coverprofile=coverage.out $(PKG)
	@go tool cover -html=coverage.out -o coverage.html
	@go tool cover -func=coverage.out | tail -n 1

# With Go's default, a minute to minimise each input that reaches new code, a target
# makes a handful of executions in a minute.
.PHONY: fuzz
fuzz: ## run every fuzz target of every module for TIME, 30s; a finding fails, and is kept as a test in testdata
	@for m in . $(inner); do (cd "$$m" && go list -f '{{.ImportPath}} {{.Dir}}' ./...) || exit 1; done | while read -r package dir; do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$dir"/*_test.go 2>/dev/null); do \
			out="$$(cd "$$dir" && go test -vet=off -run='^$$' -fuzz="^$$target\$$" -fuzztime=$(TIME) -fuzzminimizetime=100x . 2>&1)" || { echo "$$out"; exit 1; }; \
			execs="$$(echo "$$out" | sed -n 's/.*execs: \([0-9]*\).*/\1/p' | tail -n 1)"; \
			printf '%12s executions  %s %s\n' "$${execs:-0}" "$$package" "$$target"; \
			[ "$${execs:-0}" -gt 0 ] || { echo "$$out"; echo "$$target does not run." >&2; exit 1; }; \
		done || exit 1; \
	done

# The database is the data of a Go module, which tools/go.mod pins, so that what
# passes today passes tomorrow. `go -C tools get golang.org/x/vulndb@latest` gets a
# newer one. Modules without code, which pin programs of others, call nothing.
.PHONY: vuln
vuln: ## look for known vulnerabilities: one that is called in a module fails; works without a network
	@dir="$$(mktemp -d)" && trap 'rm -rf "$$dir"' EXIT && go build -o "$$dir/vulnreport" ./internal/vulnreport && \
	go -C tools mod download golang.org/x/vulndb && db="file://$$(go -C tools list -m -f '{{.Dir}}' golang.org/x/vulndb)/data/osv" && failed=0 && \
	for m in . $(inner); do \
		echo "==> look for known vulnerabilities in $$m" && \
		(cd "$$m" && $(tool) govulncheck -db "$$db" -format json ./...) > "$$dir/found" || exit 1; \
		"$$dir/vulnreport" < "$$dir/found" || failed=1; \
	done && exit $$failed

# Parts of `make test`.

# The race detector needs cgo, and cgo a C compiler. Say so at once and not
# after everything else has passed.
.PHONY: race-ready
race-ready:
	@echo "==> check that the race detector can be built"
	@cc="$$(go env CC)"; \
	if [ "$$(go env CGO_ENABLED)" != 1 ] || ! command -v "$${cc%% *}" >/dev/null; then \
		echo "The race detector needs cgo and a C compiler ($$cc), and one of them is missing." >&2; \
		echo "Unset CGO_ENABLED and install the compiler (on Debian: apt-get install gcc libc6-dev)." >&2; \
		echo "'make unit' runs the tests without the race detector." >&2; \
		exit 1; \
	fi

.PHONY: check-fmt
check-fmt:
	@echo "==> check the format"
	@$(tool) golangci-lint fmt --diff || { echo "Run 'make fmt'." >&2; exit 1; }

.PHONY: check-tidy
check-tidy:
	@for m in . tools $(inner); do \
		echo "==> check that $$m/go.mod is tidy"; \
		(cd "$$m" && go mod tidy -diff) || { echo "Run 'make tidy'." >&2; exit 1; }; \
	done

.PHONY: vet
vet:
	@echo "==> vet"
	@go vet ./...
	@for m in $(inner); do echo "==> vet $$m"; (cd "$$m" && go vet ./...) || exit 1; done

# The race detector allocates, so what is counted is counted without it.
.PHONY: allocs
allocs:
	@echo "==> count allocations"
	@go test -timeout=$(TIMEOUT) -run='^TestAlloc' ./mono ./telemetry/...

# 386 finds what takes int for 64 bits, Windows what takes paths and signals
# for those of Unix.
.PHONY: build
build:
	@for p in linux/amd64 linux/386 windows/amd64; do \
		echo "==> build every package and example for $$p"; \
		CGO_ENABLED=0 GOOS=$${p%/*} GOARCH=$${p#*/} go build ./... || exit 1; \
	done
	@for m in $(inner); do echo "==> build $$m"; (cd "$$m" && go build -o /dev/null ./...) || exit 1; done
