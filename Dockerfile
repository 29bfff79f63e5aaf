# The shop of examples/orders and the command monotel, in an image that holds nothing
# else: no shell, no package, nobody's password.
#
#   docker build -t monotel/orders .
#
# deploy/Dockerfile.binary makes the same image from programs that are built already.
ARG BUILDER_IMAGE=golang:1.26-alpine
FROM ${BUILDER_IMAGE} AS build

# The image's Go builds it, and downloads no other one. Nothing needs a C library.
ENV GOTOOLCHAIN=local CGO_ENABLED=0 GOFLAGS=-buildvcs=false
WORKDIR /src

# Where modules come from: a proxy of your own, where there is no other.
ARG GOPROXY

# The modules first: this layer stays until they change.
COPY go.mod go.sum ./
RUN go mod download

COPY . .
RUN mkdir /out && go build -trimpath -ldflags='-s -w' -o /out/ ./examples/orders ./cmd/monotel

FROM scratch

# For NATS servers and collectors with TLS.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /out/orders /out/monotel /

# Nobody in particular. PATH is for `docker compose exec consumers monotel`.
USER 65532:65532
ENV PATH=/
ENTRYPOINT ["/orders"]
