# The agent's image: one static binary and nothing else.
#
#   docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=v0.1.0 .
#   hack/build-image.sh agent.tar        (no container engine, no network)
#
# The compiler runs on the machine that builds, whatever it builds for. The same
# commit, VERSION and SOURCE_DATE_EPOCH give the same binary.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
ARG GOPROXY
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
ARG TARGETOS=linux
ARG TARGETARCH
ARG VERSION=devel
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -buildvcs=false \
    -ldflags "-s -w -buildid= -X main.version=$VERSION" -o /out/agent ./cmd/agent

# Nothing of a distribution: no shell, no libc, no package to patch. Time zones are
# in the binary; certificates of the cluster come with the service account.
FROM scratch
LABEL org.opencontainers.image.source=https://github.com/hosthygiene/agent \
      org.opencontainers.image.licenses=Apache-2.0
COPY --from=build --chmod=0755 /out/agent /agent
ENTRYPOINT ["/agent"]
