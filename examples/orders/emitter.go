package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/mono"
)

// An emitter is the half of the shop that takes orders: over HTTP, and from customers
// who come by themselves.
type emitter struct {
	shop       *shop
	rate       float64 // of those who come by themselves, a second; 0 if none do
	sold       *sales
	propagator propagation.TextMapPropagator
}

func newEmitter(o options, ob *observation) *emitter {
	sold := newSales()
	s := &shop{tracking: tracking.New(func(tracking.OrderCreatedEvent) {}), witness: sold, tracer: ob.tracer()}
	return &emitter{shop: s, rate: o.rate, sold: sold, propagator: ob.propagator()}
}

func (e *emitter) modules() []mono.Module { return []mono.Module{e.shop.tracking} }

func (*emitter) options() []mono.Option { return nil }

func (e *emitter) run(ctx context.Context, bus mono.EventBus) {
	if e.rate == 0 {
		<-ctx.Done()
		return
	}
	e.shop.bus = bus
	e.shop.open(ctx, e.rate)
}

func (e *emitter) routes(mux *http.ServeMux) {
	const orders = "/orders"
	mux.Handle("POST "+orders, e.traced(orders, http.HandlerFunc(e.postOrder)))
	mux.HandleFunc("GET "+orders, func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, e.sold.state()) })
}

// An orderRequest is what a customer sends.
type orderRequest struct {
	Customer string  `json:"customer"`
	Amount   float64 `json:"amount"`
}

// An orderReply is what the customer gets, when the order is stored.
type orderReply struct {
	OrderID string `json:"order_id"`
	TraceID string `json:"trace_id,omitempty"` // none where no trace is made
}

// postOrder takes an order. Its answer does not wait for the consumers.
func (e *emitter) postOrder(w http.ResponseWriter, r *http.Request) {
	order, err := readOrder(w, r)
	if err != nil {
		refuse(w, statusOf(err), err)
		return
	}
	// A customer who hangs up does not leave an order of which nobody knows whether it
	// is stored.
	const patience = 10 * time.Second
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), patience)
	defer cancel()
	span := trace.SpanFromContext(ctx)
	span.SetAttributes(keyCustomer.String(order.Customer))
	id, err := e.shop.take(ctx, order.Customer, order.Amount)
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err)
		return
	}
	span.SetAttributes(keyOrder.String(id))
	reply := orderReply{OrderID: id}
	if sc := span.SpanContext(); sc.IsValid() {
		reply.TraceID = sc.TraceID().String()
	}
	answer(w, http.StatusCreated, reply)
}

var errContentType = errors.New("want the content type application/json or application/x-www-form-urlencoded")

// statusOf is the status of a request that cannot be read.
func statusOf(err error) int {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return http.StatusRequestEntityTooLarge
	}
	if errors.Is(err, errContentType) {
		return http.StatusUnsupportedMediaType
	}
	return http.StatusBadRequest
}

// readOrder reads an order from JSON or from a form.
func readOrder(w http.ResponseWriter, r *http.Request) (orderRequest, error) {
	const most = 16 << 10
	var order orderRequest
	r.Body = http.MaxBytesReader(w, r.Body, most)
	kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")) // what is malformed is none
	switch kind {
	case "application/json":
		d := json.NewDecoder(r.Body)
		d.DisallowUnknownFields()
		if err := d.Decode(&order); err != nil {
			return order, fmt.Errorf("read the order: %w", err)
		}
		if d.More() {
			return order, errors.New("read the order: something follows it")
		}
	case "application/x-www-form-urlencoded":
		if err := r.ParseForm(); err != nil {
			return order, fmt.Errorf("read the order: %w", err)
		}
		order.Customer = r.PostForm.Get("customer")
		var err error
		if order.Amount, err = strconv.ParseFloat(r.PostForm.Get("amount"), 64); err != nil {
			return order, fmt.Errorf("amount: want a number: %w", err)
		}
	default:
		return order, errContentType
	}
	return order, order.validate()
}

func (o orderRequest) validate() error {
	const (
		longest  = 64
		dearest  = 1e6
		controls = "customer: want a name without control characters"
	)
	var errs []error
	switch {
	case strings.TrimSpace(o.Customer) == "":
		errs = append(errs, errors.New("customer: want a name"))
	case !utf8.ValidString(o.Customer) || strings.ContainsFunc(o.Customer, unicode.IsControl):
		errs = append(errs, errors.New(controls))
	case utf8.RuneCountInString(o.Customer) > longest:
		errs = append(errs, fmt.Errorf("customer: want at most %d characters", longest))
	}
	if !(o.Amount > 0 && o.Amount <= dearest) || math.IsNaN(o.Amount) {
		errs = append(errs, fmt.Errorf("amount: want more than 0, up to %.0f", dearest))
	}
	return errors.Join(errs...)
}

// traced answers requests within a span, named and described as OpenTelemetry's
// conventions for HTTP have it. It goes on with the trace of a request that brings one.
// Package otelhttp does the same, and more, for programs with many routes.
func (e *emitter) traced(route string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := e.propagator.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
		ctx, span := e.shop.tracer.Start(ctx, r.Method+" "+route,
			trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(describe(r, route)...))
		defer span.End()
		seen := &statusWriter{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(seen, r.WithContext(ctx))
		span.SetAttributes(semconv.HTTPResponseStatusCode(seen.status))
		if seen.status >= http.StatusInternalServerError { // what the customer did wrong is no error of ours
			span.SetStatus(codes.Error, "")
			span.SetAttributes(semconv.ErrorTypeKey.String(strconv.Itoa(seen.status)))
		}
	})
}

func describe(r *http.Request, route string) []attribute.KeyValue {
	attrs := []attribute.KeyValue{
		semconv.HTTPRequestMethodKey.String(r.Method), semconv.HTTPRoute(route), semconv.URLScheme("http"),
		semconv.URLPath(r.URL.Path), semconv.NetworkProtocolVersion(fmt.Sprintf("%d.%d", r.ProtoMajor, r.ProtoMinor)),
	}
	if host, port, err := net.SplitHostPort(r.Host); err == nil {
		attrs = append(attrs, semconv.ServerAddress(host))
		if n, err := strconv.Atoi(port); err == nil {
			attrs = append(attrs, semconv.ServerPort(n))
		}
	} else {
		attrs = append(attrs, semconv.ServerAddress(r.Host))
	}
	if client, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		attrs = append(attrs, semconv.ClientAddress(client))
	}
	if agent := r.UserAgent(); agent != "" {
		attrs = append(attrs, semconv.UserAgentOriginal(agent))
	}
	return attrs
}

// A statusWriter remembers the status of an answer.
type statusWriter struct {
	http.ResponseWriter

	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// sales counts what an emitter has published.
type sales struct {
	mu   sync.Mutex
	have salesState
}

// A salesState is the answer of GET /orders.
type salesState struct {
	Orders    int            `json:"orders"`     // stored
	Garbage   int            `json:"garbage"`    // stored, and no orders
	NotStored int            `json:"not_stored"` // or not known to be
	Customers map[string]int `json:"customers"`  // stored, of each
}

func newSales() *sales { return &sales{have: salesState{Customers: make(map[string]int)}} }

func (*sales) garbage() {}

func (s *sales) published(customer string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
		s.have.NotStored++
	case customer == nobody:
		s.have.Garbage++
	default:
		s.have.Orders++
		s.have.Customers[oneOf(s.have.Customers, customer)]++
	}
}

func (s *sales) state() salesState {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.have
	have.Customers = maps.Clone(have.Customers)
	return have
}

// oneOf is the key of a customer in a table, which does not grow without end: whoever
// comes when it is full is counted with all the others.
func oneOf[T any](table map[string]T, customer string) string {
	const (
		most   = 100
		others = "(others)"
	)
	if _, ok := table[customer]; !ok && len(table) >= most {
		return others
	}
	return customer
}
