//! `#[derive(Trace)]` for `dune-gc`; documented there.

use proc_macro::TokenStream;
use proc_macro2::TokenStream as Tokens;
use quote::{format_ident, quote};
use syn::{Data, DeriveInput, Fields, GenericParam, parse_macro_input, parse_quote};

/// Implements `dune_gc::Trace` by tracing every field. The type must not implement `Drop`
/// (its fields may): an object that is collected must not look at others that are.
#[proc_macro_derive(Trace)]
pub fn derive_trace(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input)
        .unwrap_or_else(|error| error.to_compile_error())
        .into()
}

fn expand(input: &DeriveInput) -> syn::Result<Tokens> {
    let name = &input.ident;
    let mut generics = input.generics.clone();
    for parameter in &mut generics.params {
        if let GenericParam::Type(parameter) = parameter {
            parameter.bounds.push(parse_quote!(::dune_gc::Trace));
        }
    }
    let (impl_generics, type_generics, where_clause) = generics.split_for_impl();
    let (body, types) = match &input.data {
        Data::Struct(data) => {
            let (pattern, calls) = trace_fields(&data.fields);
            // A pattern, so that a field that another macro adds afterwards is an error.
            (
                quote!(let Self #pattern = self; #calls),
                types_of(&data.fields),
            )
        }
        Data::Enum(data) => {
            let arms = data.variants.iter().map(|variant| {
                let variant_name = &variant.ident;
                let (pattern, calls) = trace_fields(&variant.fields);
                quote!(Self::#variant_name #pattern => { #calls })
            });
            // A type without variants has no value to trace.
            let body = if data.variants.is_empty() {
                quote!(match *self {})
            } else {
                quote!(match self { #(#arms),* })
            };
            let types = data
                .variants
                .iter()
                .flat_map(|variant| types_of(&variant.fields));
            (body, types.collect())
        }
        Data::Union(_) => {
            return Err(syn::Error::new_spanned(
                name,
                "Trace cannot be derived for a union: which field is there is not known",
            ));
        }
    };
    Ok(quote! {
        const _: () = {
            // Fails to compile, by two implementations of one trait, if the type has `Drop`.
            trait MustNotImplementDrop {}
            #[allow(drop_bounds, reason = "that is the check")]
            impl<T: ::core::ops::Drop> MustNotImplementDrop for T {}
            impl #impl_generics MustNotImplementDrop for #name #type_generics #where_clause {}

            // SAFETY: every field is traced, and there is no `Drop` that could look at one.
            #[allow(unsafe_code, reason = "what the macro guarantees")]
            unsafe impl #impl_generics ::dune_gc::Trace for #name #type_generics #where_clause {
                const HAS_POINTERS: bool =
                    false #(|| <#types as ::dune_gc::Trace>::HAS_POINTERS)*;

                #[inline]
                #[allow(unused_variables, reason = "there may be no field")]
                fn trace(&self, tracer: &mut ::dune_gc::Tracer<'_, '_>) {
                    #body
                }
            }
        };
    })
}

fn types_of(fields: &Fields) -> Vec<&syn::Type> {
    fields.iter().map(|field| &field.ty).collect()
}

/// The pattern that binds all fields, and the calls that trace them.
fn trace_fields(fields: &Fields) -> (Tokens, Tokens) {
    let names: Vec<_> = (0..fields.len())
        .map(|index| format_ident!("field_{index}"))
        .collect();
    let calls = quote!(#(::dune_gc::Trace::trace(#names, tracer);)*);
    let pattern = match fields {
        Fields::Unit => quote!(),
        Fields::Unnamed(_) => quote!((#(#names),*)),
        Fields::Named(fields) => {
            let members = fields.named.iter().map(|field| &field.ident);
            quote!({ #(#members: #names),* })
        }
    };
    (pattern, calls)
}
