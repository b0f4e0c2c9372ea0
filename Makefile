# `make run` checks this machine; `make test` proves everything, on a real
# cluster with a real node, and installs what it needs itself.

VERSION ?= $(shell sed -n 's/^## \[\([0-9][^]]*\)\].*/v\1/p' CHANGELOG.md | head -n 1)
GOFLAGS_BUILD = -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"
export CGO_ENABLED ?= 0

.PHONY: build install plugin run test unit race cluster-tests e2e nightly fuzz fuzz-proof bench bench-fleet bench-node plots lint supply-chain setup image generate cluster-up cluster-down chaos soak tutorial clean

build: ## the agent and the kubectl plugin, static, in bin/
	go build $(GOFLAGS_BUILD) -o bin/agent ./cmd/agent
	go build $(GOFLAGS_BUILD) -o bin/kubectl-hygiene ./cmd/kubectl-hygiene

# Completion is a file a shell finds by the command's name; kubectl asks
# kubectl_complete-hygiene of the PATH.
PREFIX ?= /usr/local
SHARE = $(DESTDIR)$(PREFIX)/share
install: build ## both, their manual pages and completion, under PREFIX (and DESTDIR)
	install -d $(DESTDIR)$(PREFIX)/bin $(SHARE)/man/man1 $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	install -m 0755 bin/agent bin/kubectl-hygiene cmd/kubectl-hygiene/kubectl_complete-hygiene $(DESTDIR)$(PREFIX)/bin
	install -m 0644 docs/man/*.1 $(SHARE)/man/man1
	bin/agent completion bash >$(SHARE)/bash-completion/completions/agent
	bin/agent completion zsh >$(SHARE)/zsh/site-functions/_agent
	bin/agent completion fish >$(SHARE)/fish/vendor_completions.d/agent.fish

plugin: ## the kubectl plugin for every platform, as archives for krew, in dist/
	VERSION=$(VERSION) hack/build-plugin.sh

# Findings are what a check is for, so only a check that could not be made at
# all fails the target.
run: build ## build the agent and check this very machine
	@./bin/agent check; code=$$?; [ $$code -ne 2 ]

test: setup race fuzz cluster-tests ## everything, set up from nothing

unit: ## the fast inner loop
	go test ./cmd/... ./pkg/... ./manifests/... ./test/arch ./test/distros ./test/figures ./test/fuzzproof ./test/monitoring ./test/soak ./test/tutorial

race: setup
	CGO_ENABLED=1 go test -race ./cmd/... ./pkg/... ./manifests/...

fuzz: ## each fuzzer for a short while; FUZZTIME=1m for longer
	hack/fuzz.sh

FUZZER ?= .
fuzz-proof: ## a bug sown under each fuzzer, which must find it; ten minutes, or FUZZER=FuzzDiff for one
	go test -count=1 -timeout 2h -v ./test/fuzzproof -run 'TestFuzzersFindBugs' -prove -fuzzer '$(FUZZER)'

cluster-tests: setup ## a real API server, a real node, every scenario
	go test -tags cluster -count=1 -timeout 40m -v -p 2 ./test/...

e2e: setup ## only the scenarios on the real node
	go test -tags cluster -count=1 -timeout 40m -v ./test/e2e

nightly: setup ## what takes longer: outages, reboots, repairs, the tutorial, longer fuzzing; not chaos and soak
	FUZZTIME=30s hack/fuzz.sh
	go test -count=1 -timeout 2h -v ./test/fuzzproof -run 'TestFuzzersFindBugs' -prove
	HYGIENE_NIGHTLY=1 go test -count=1 ./pkg/probes -run TestHostileFiles
	HYGIENE_NIGHTLY=1 go test -tags cluster -count=1 -timeout 3h -v -p 1 ./test/...

# SEED=4711 repeats a run's random moments; KILLS=20 takes less time.
SEED ?= 0
KILLS ?= 100
chaos: setup ## what may go wrong around the agent, an hour, into docs/reliability.md
	go test -tags cluster -count=1 -timeout 2h -v ./test/e2e -run '^TestChaos$$' -chaos=$(CURDIR)/docs/reliability.md -seed=$(SEED) -kills=$(KILLS)

# FOR=5m is a short one, SEED=4711 makes the same faults again. BROKEN=pids
# breaks the agent first, by test/e2e/testdata/broken/pids.diff: it has to fail.
FOR ?= 30m
BROKEN ?=
soak: setup ## faults of all kinds at random for half an hour, and a node that lacks what the agent needs, into docs/reliability.md
	go test -tags cluster -count=1 -timeout 3h -v ./test/e2e -run '^Test$(if $(BROKEN),Soak,(Soak|Starved))$$' \
		-soak=$(FOR) -soak-seed=$(SEED) -broken=$(BROKEN) -soak-figures=$(CURDIR)/docs/reliability.md

tutorial: setup ## docs/tutorial.md on a fresh cluster, as a reader types it; its pictures made anew
	HYGIENE_NIGHTLY=1 go test -tags cluster -count=1 -timeout 70m -v ./test/tutorial -run TestTutorial -pictures

bench: ## passes over a large host, the first and those that follow, with half and double
	go test -run '^$$' -bench . -benchmem ./pkg/...

bench-fleet: ## what 500 to 5,000 nodes cost an API server, into docs/performance.md; 25 minutes
	go run ./test/fleet -doc docs/performance.md

plots: ## the curves in docs/img: hosts of up to 100,000 of everything, minutes and gigabytes
	go test -run '^$$' -bench BenchmarkGrowth -benchtime 3x -benchmem -timeout 30m ./pkg/engine -grow 100000 | tee /dev/stderr | go -C hack/plots run . $(CURDIR)/docs/img

# MEASURE=idle measures only that; REPETITIONS=5 is a first impression;
# HYGIENE_NIGHTLY=1 reboots the node as often, too.
MEASURE ?=
REPETITIONS ?= 20
bench-node: setup ## what the agent costs and how soon it tells, on the real node, into docs/performance.md
	go test -tags cluster -count=1 -timeout 12h -v ./test/e2e -run '^TestFigures$$/^$(MEASURE)' \
		-figures=$(CURDIR)/docs/performance.md -repetitions=$(REPETITIONS)

lint: setup
	hack/lint.sh

supply-chain: ## licences and known vulnerabilities of what is linked; a part of lint
	hack/supply-chain.sh

setup:
	@hack/setup.sh

image: setup ## the container image as an archive in dist/, its bill of materials beside it
	hack/build-image.sh dist/image.tar

generate: ## manifests, documents, manual pages, schema, alerts, dashboard and the list of linked packages, from their sources
	go test ./manifests ./pkg/config ./pkg/probes ./test/arch ./test/distros ./test/monitoring -run 'Test(Rendered|Manifest|Schema|Reasons|Profiles|Linked|Distributions|Generated|Runbooks)' -update
	go test ./cmd/... -run TestManPages -update

cluster-up: setup ## the test cluster, left up for a person
	go run ./test/cluster up

cluster-down:
	go run ./test/cluster down

clean:
	rm -rf bin dist
